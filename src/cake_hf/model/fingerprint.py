"""The identity of a model by its content: config metadata, a checksum over all weights, and active adapters.

Two models with equal fingerprints compute equal KV for equal tokens on machines that round alike (see `model.numerics`). Names
and paths do not count, only content does.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import xxhash

from cake_hf.chunks.aligned_memory import host_bytes, odd_factors
from cake_hf.model.look import Named, modules_of, those_with
from cake_hf.model.weights import Weight, weights
from cake_hf.util.forks import Lock, refusal

logger = logging.getLogger("cake_hf")

HASHED_BLOCK = 2**15
"""64-bit words per row of the on-device checksum."""
SAMPLES_PER_TENSOR = 16

_SILENT_CONFIG = {
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "architectures",
    "use_cache",
    "dtype",
    "torch_dtype",
}
"""Config entries that do not affect the computation; the dtype that matters is the weights' own."""


@dataclass(frozen=True)
class _Known:
    signature: int
    digest: str


_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[bool, _Known]] = weakref.WeakKeyDictionary()
_known_lock = Lock()


def model_metadata(model: torch.nn.Module, *, portable: bool) -> dict[str, Any]:
    """Returns everything about a model that changes its KV, except the machine's numerics.

    Args:
        model: with a `config` that has `to_dict()`.
        portable: make the weights' digest the same on every device (slower if weights are not on the CPU).

    Returns:
        JSON-ready metadata.
    """
    metadata: dict[str, Any] = {
        "class": type(model).__name__,
        "config": config_metadata(model.config),
        "weights": weights_digest(model, portable=portable),
        "adapters": adapter_metadata(model),
    }
    modules = modules_of(model)
    if rounded := rounded_buffers(modules):
        metadata["rounded"] = rounded
    if foreign := foreign_modules(modules):
        metadata["modules"] = foreign
    return metadata


def config_metadata(config: Any) -> dict[str, Any]:
    """Returns the config without entries that do not affect the computation (name, path, library version)."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): strip(v) for k, v in value.items() if k not in _SILENT_CONFIG}
        if isinstance(value, (list, tuple)):
            return [strip(item) for item in value]
        return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

    metadata: dict[str, Any] = strip(config.to_dict())
    return metadata


def rounded_buffers(modules: Named) -> list[str]:
    """Lists buffers that a model derives from its config and creates in float32, but keeps in another dtype.

    `model.to(torch.bfloat16)` rounds the rotary frequencies, too; `from_pretrained(..., dtype=torch.bfloat16)` does not. So the
    same weights may give different KV.
    """
    return [
        f"{path}.{name}: {buffer.dtype}"
        for path, module in modules
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set
        and buffer is not None
        and buffer.is_floating_point()
        and buffer.dtype != torch.float32
    ]


def adapter_metadata(model: torch.nn.Module) -> list[str]:
    """Lists the active adapters, module by module. Their weights are parameters and are counted there."""
    metadata = []
    for name, module in those_with(model, "active_adapters", "merged_adapters"):
        state = (module.active_adapters, module.merged_adapters, module.disable_adapters)
        metadata.append(f"{name}: {state} {sorted(getattr(module, 'scaling', {}).items())}")
    return metadata


def foreign_modules(modules: Named) -> list[str]:
    """Lists paths and classes of modules that come neither from torch.nn nor from the model's own library.

    They may compute a different result with the same weights: some quantise only in the forward.
    """
    (_, model), *below = modules
    usual = ("torch.nn.", f"{type(model).__module__.split('.')[0]}.")
    foreign = {kind for kind in {type(module) for _, module in below} if not kind.__module__.startswith(usual)}
    return [
        f"{path}: {kind.__module__}.{kind.__qualname__}"
        for path, kind in ((path, type(module)) for path, module in below)
        if kind in foreign
    ]


def adapters_vary(model: torch.nn.Module) -> bool:
    """Returns whether adapters apply by row or by position in the prompt (`adapter_names`, aLoRA, X-LoRA).

    Their effect then depends on none of the call's arguments, and so no key covers it. All of these install hooks, or a forward
    of their own, on the adapted modules.
    """
    return any(
        module._forward_pre_hooks or ("forward" in vars(module) and not hasattr(module, "_hf_hook"))
        for _, module in those_with(model, "merged_adapters")
    )


def weights_digest(model: torch.nn.Module, *, portable: bool = False, found: Sequence[Weight] | None = None) -> str:
    """Returns a checksum over the names, shapes, dtypes and bytes of all weights.

    It is computed once per model and kept for the model's lifetime. It is computed again if a cheap look (addresses, version
    counters, a few sampled values of every tensor) detects that a weight was changed or replaced. That look cannot detect a
    manual edit through `.data` of single values that happen not to be sampled.

    Args:
        model: any module.
        portable: hash on the host, so that the result does not depend on the device.
        found: the model's weights, if they are known already; they must all be in memory.
    """
    signature = _signature(_all(model) if found is None else found)
    with _known_lock:
        known = _known.get(model, {}).get(portable)
    if known is not None and known.signature == signature:
        return known.digest
    digest = xxhash.xxh3_128()
    for weight in _all(model) if found is None else found:
        tensor = weight.content()
        digest.update(f"{weight.name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        # Offloaded or not, a weight is hashed on the device that computes with it, so that its digest is the same.
        device = weight.device or tensor.device
        on_host = portable or device.type == "cpu"
        digest.update(host_bytes(tensor) if on_host else _device_digest(tensor.to(device)))
    result = str(digest.hexdigest())
    with _known_lock:
        _known.setdefault(model, {})[portable] = _Known(signature, result)
    return result


def is_digest_known(model: torch.nn.Module, *, portable: bool) -> bool:
    """Returns whether `weights_digest` has computed a checksum before, of whatever weights the model then had."""
    with _known_lock:
        return portable in _known.get(model, {})


def look_at_weights(model: torch.nn.Module) -> int:
    """Returns the cheap signature by which `weights_digest` detects changed weights."""
    return _signature(_all(model))


def forget_weights(model: torch.nn.Module) -> None:
    """Forgets the checksum after a change of the weights that the cheap look does not detect; the next use recomputes it."""
    with _known_lock:
        _known.pop(model, None)


def _all(model: torch.nn.Module) -> Iterable[Weight]:
    return chain.from_iterable(weights(model))


def _signature(found: Iterable[Weight]) -> int:
    """Returns a cheap hash that changes if a weight does: over identity, version and some values of each tensor."""
    identity: list[Any] = []
    samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for weight in found:
        name, tensor = weight.name, weight.tensor
        if weight.elsewhere is not None and (stamp := weight.elsewhere.stamp()) is not None:
            identity.append((name, tensor.dtype, tuple(tensor.shape), stamp))
            continue
        if weight.elsewhere is not None:
            tensor = weight.content()
        if not weight.in_place:  # a copy made for this call: only its content identifies it
            identity.append((name, tensor.dtype, tuple(tensor.shape), xxhash.xxh3_64_intdigest(host_bytes(tensor))))
            continue
        version = 0 if tensor.is_inference() else tensor._version
        identity.append((name, tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape)))
        if tensor.is_contiguous():
            samples.setdefault((tensor.device, tensor.dtype), []).append(_sampled(tensor))
    values = [torch.cat(group).cpu().view(torch.uint8).numpy().tobytes() for group in samples.values()]
    return hash((tuple(identity), *values))


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a view of some values of a contiguous tensor, spread over all of it."""
    count, flat = min(tensor.numel(), SAMPLES_PER_TENSOR), tensor.detach()
    return flat.as_strided((count,), (max(1, tensor.numel() // SAMPLES_PER_TENSOR),))


def _device_digest(tensor: torch.Tensor) -> bytes:
    """Computes a checksum on the tensor's device: each row of 64-bit words is multiplied by fixed odd numbers and summed.

    Arithmetic is modulo 2**64, so the order of summation does not matter. An odd factor is invertible, so any change of a
    single word changes its row's sum. The rows' sums are hashed in order on the host.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() - flat.numel() % (8 * HASHED_BLOCK)
    if flat.storage_offset() % 8:  # cannot be viewed as 64-bit words
        whole = 0
    # Only the incomplete last row is copied, to pad it: there may be no memory for a copy of the largest weights.
    rest = torch.nn.functional.pad(flat[whole:], (0, (whole - flat.numel()) % (8 * HASHED_BLOCK)))
    factors = odd_factors(HASHED_BLOCK).to(tensor.device)
    parts = [flat[:whole], rest] if whole else [rest]
    rows = [part.view(torch.int64).view(-1, HASHED_BLOCK).split(256) for part in parts]
    sums = torch.cat([(some * factors).sum(dim=1) for some in chain(*rows)])
    return hashlib.blake2b(sums.cpu().numpy().tobytes(), digest_size=16).digest()


_under_way: weakref.WeakKeyDictionary[torch.nn.Module, threading.Thread] = weakref.WeakKeyDictionary()
_under_way_lock = Lock()


def begin_digest(model: torch.nn.Module, *, portable: bool) -> None:
    """Starts to compute the checksum of a model's weights, unless it is known. Call `await_digest` before it is used.

    It is computed beside the short forward that a first prompt begins with, which keeps few cores busy.

    What the thread finds counts only if the weights are then still the same, as for any checksum that is remembered. A model
    whose weights are not all in host memory is left alone: hooks may move them during a forward, and a GPU has other work.
    """
    if is_digest_known(model, portable=portable):
        return
    found = list(chain.from_iterable(weights(model)))
    if not all(weight.in_place and weight.tensor.device.type == "cpu" for weight in found):
        return
    thread = threading.Thread(target=_digest_ahead, args=(model, portable, found), name="cake-weights", daemon=True)
    with _under_way_lock:
        if model in _under_way:
            return
        _under_way[model] = thread
    if refusal(thread) is not None:  # it is computed when it is needed
        with _under_way_lock:
            _under_way.pop(model, None)


def await_digest(model: torch.nn.Module) -> None:
    """Waits for the thread that `begin_digest` started, if there is one."""
    with _under_way_lock:
        thread = _under_way.pop(model, None)
    if thread is not None:
        thread.join()


def _digest_ahead(model: torch.nn.Module, portable: bool, found: Sequence[Weight]) -> None:
    try:
        weights_digest(model, portable=portable, found=found)
    except Exception as error:  # an error that lasts is raised where the checksum is needed
        logger.debug("The weights' checksum is computed later: %s", error)
