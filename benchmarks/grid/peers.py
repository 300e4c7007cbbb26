"""The alternatives without us: the whole `DynamicCache` of a document in one file, loaded before `generate`.

Two ways of saving it are common: `torch.save` of its tensors, and safetensors. It is loaded as a whole, and nothing is
computed meanwhile. In a throttled cell, the file takes no less than its bytes over the bandwidth, as our chunks do.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.models import cache_of
from benchmarks.workbench import Workbench

Pairs = list[tuple[torch.Tensor, torch.Tensor]]

FORMATS = ("torch", "safetensors")


class SavedCache:
    """The KV of a bench's prefix in a file of each format; made from chunks, so that a continuation is exact.

    Args:
        bench: with the prompt.
        folder: for the files; the caller removes it.
    """

    def __init__(self, bench: Workbench, folder: Path) -> None:
        self._model, self._device = bench.model, bench.settings.device
        self._paths = {name: folder / f"whole.{name}" for name in FORMATS}
        with bench.cache(bench.filled_store(), strategy="load") as cache:
            cache.prefill(bench.ids)
            pairs = [(layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers]
        torch.save(pairs, self._paths["torch"])
        safetensors.torch.save_file(_named(pairs), self._paths["safetensors"])

    def in_memory(self) -> dict[str, bytes]:
        """Returns the files' bytes, by format."""
        return {name: path.read_bytes() for name, path in self._paths.items()}

    def loader(self, name: str, bytes_per_second: float | None = None, held: bytes | None = None) -> Callable[[], Any]:
        """Returns a function that loads the file, anew each time, into a `DynamicCache` on the device.

        Args:
            name: the format.
            bytes_per_second: of the throttle; None for none.
            held: the file's bytes, if it is to come from memory.
        """
        path, device = self._paths[name], self._device
        read = _from_memory(name, held, device) if held is not None else _from_file(name, path, device)
        least = 0.0 if bytes_per_second is None else path.stat().st_size / bytes_per_second

        def load() -> Any:
            begin = time.monotonic()
            pairs = read()
            time.sleep(max(0.0, begin + least - time.monotonic()))
            return cache_of(self._model, pairs)

        return load


def _from_file(name: str, path: Path, device: str) -> Callable[[], Pairs]:
    if name == "torch":
        return lambda: torch.load(path, map_location=device, weights_only=True)
    return lambda: _paired(safetensors.torch.load_file(path, device=device))


def _from_memory(name: str, held: bytes, device: str) -> Callable[[], Pairs]:
    if name == "torch":
        return lambda: torch.load(io.BytesIO(held), map_location=device, weights_only=True)
    return lambda: [(k.to(device), v.to(device)) for k, v in _paired(safetensors.torch.load(held))]


def _named(pairs: Pairs) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{what}": tensor for number, pair in enumerate(pairs) for what, tensor in zip("kv", pair, strict=True)
    }


def _paired(named: dict[str, torch.Tensor]) -> Pairs:
    return [(named[f"{number}.k"], named[f"{number}.v"]) for number in range(len(named) // 2)]
