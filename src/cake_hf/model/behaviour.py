"""A model's behaviour, determined by running it: a fixed short forward, whose KV is part of the namespace.

Some changes to a model are not in a weight, a config entry, or code that can be identified by name: an edited buffer, a kernel
replaced under its name, a module in place of another. They change this KV. So the chunks of such a model have their own keys,
and it finds none of the unchanged model's chunks.

This cannot detect a change that takes effect only beyond some number of tokens in a forward, or only at certain tokens. For
these, a restore compares computed chunks with stored ones (`restore.audit`).

An edit of a single embedding row through `.data` or numpy leaves no trace that a cheap look at a weight would detect, and it
affects only prompts with that token. So each prompt's own rows are compared with checksums remembered per row (`rows_changed`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch

from cake_hf.chunks.aligned_memory import host_bytes, odd_factors
from cake_hf.chunks.codec import checksum
from cake_hf.layers.compat import LinearAttentionLayer
from cake_hf.layers.recurrent import states_of
from cake_hf.model.kv_layout import Made, probed
from cake_hf.util.forks import Lock

Kept = dict[str, torch.Tensor]


def behaviour(model: torch.nn.Module) -> tuple[Kept, Made]:
    """Returns the KV that a model currently computes for a few tokens, by name, and what kind of KV that is."""
    layers, made = probed(model)
    return {name: tensor.cpu() for name, tensor in _kept(layers)}, made


def behaviour_digest(seen: Kept) -> str:
    """Returns a digest of every bit of the result of `behaviour`."""
    parts: list[bytes] = []
    for name, tensor in seen.items():
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        parts.append(bytes(host_bytes(tensor)))
    return checksum(b"".join(parts))


def _kept(layers: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for number, layer in enumerate(layers):
        for name in ("keys", "values", "indexer_keys"):
            if isinstance(tensor := getattr(layer, name, None), torch.Tensor):
                yield f"{number}.{name}", tensor
        if isinstance(layer, LinearAttentionLayer):
            yield from ((f"{number}.{name}", state) for name, state in states_of(layer).items())


ROWS_AT_ONCE = 2**14

_sums: weakref.WeakKeyDictionary[torch.nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()
_lock = Lock()


def rows_changed(model: torch.nn.Module, ids: torch.Tensor) -> bool:
    """Returns whether the rows of these tokens have changed since `remember_rows` was called; False if it was not called."""
    with _lock:
        known = _sums.get(model)
    weight = _embedding(model)
    if known is None or weight is None:
        return False
    if known.shape[0] != weight.shape[0] or known.device != weight.device:
        return True
    rows = ids.to(weight.device).unique()
    rows = rows[(rows >= 0) & (rows < weight.shape[0])]
    return not torch.equal(_checksums(weight[rows]), known[rows])


def remember_rows(model: torch.nn.Module) -> None:
    """Computes the checksums of all rows, unless they are already known."""
    weight = _embedding(model)
    with _lock:
        if weight is None or model in _sums:
            return
        _sums[model] = torch.cat([_checksums(rows) for rows in weight.split(ROWS_AT_ONCE)])


def forget_rows(model: torch.nn.Module) -> None:
    """Forgets the checksums of a model whose weights have changed."""
    with _lock:
        _sums.pop(model, None)


def _embedding(model: Any) -> torch.Tensor | None:
    """Returns the token embedding `[vocabulary, hidden]`; None if it is not a plain tensor, or not in memory."""
    try:
        weight = model.get_input_embeddings().weight.detach()
    except (AttributeError, NotImplementedError):
        return None
    plain = type(weight) is torch.Tensor and weight.layout is torch.strided and weight.device.type != "meta"
    return weight if plain and weight.ndim == 2 and not weight.is_quantized and weight.shape[1] else None


def _checksums(rows: torch.Tensor) -> torch.Tensor:
    """Returns `[rows]` int64: the sum of each row's 64-bit words times fixed odd numbers, modulo 2**64."""
    octets = rows.contiguous().view(torch.uint8)
    if octets.shape[1] % 8:
        octets = torch.nn.functional.pad(octets, (0, -octets.shape[1] % 8))
    words = octets.view(torch.int64)
    factors = odd_factors(words.shape[1]).to(words.device)
    # The product of a matrix takes no memory and far less time; torch has it for whole numbers on the host only.
    return words @ factors if words.device.type == "cpu" else (words * factors).sum(dim=1)
