"""A model's behaviour, determined by running it: a fixed short forward, whose KV is part of the namespace.

Some changes to a model are not in a weight, a config entry, or code that can be identified by name: an edited buffer, a kernel
replaced under its name, a module in place of another. They change this KV. So the chunks of such a model have their own keys,
and it finds none of the unchanged model's chunks.

This cannot detect a change that takes effect only beyond some number of tokens in a forward, or only at certain tokens. For
these, a restore compares computed chunks with stored ones (`restore.audit`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cake_hf.chunks.codec import checksum
from cake_hf.chunks.tensor_bytes import host_bytes
from cake_hf.layers.compat import LinearAttentionLayer
from cake_hf.layers.recurrent import states_of
from cake_hf.model.kv_layout import forget_if_unlike
from cake_hf.model.probe import probed_layers

Kept = dict[str, torch.Tensor]


def behaviour(model: torch.nn.Module) -> Kept:
    """Returns the KV that a model currently computes for a few tokens, by name; see `probed_layers`.

    If that KV has a different layout from the remembered one, the layout will be determined again.

    Args:
        model: of a kind whose layers are known.
    """
    layers = probed_layers(model)
    forget_if_unlike(model, layers)
    return {name: tensor.cpu() for name, tensor in _kept(layers)}


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
