"""What a model computes, found out by running it: a short forward that is always the same, whose KV is part of the namespace.

Some changes of a model are no weight, no config entry, and no code that can be told by name: an edited buffer, a kernel swapped
under its name, a module in the place of another. They change this KV. So what such a model computes is stored under keys of its
own, and it finds none of the plain model's chunks.

What this cannot see: a change that begins only beyond some number of tokens in a forward, or only at certain tokens. For these,
a restore compares what it computes with what is stored (`restore.audit`).
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
from cake_hf.model.side_run import run_aside, some_tokens
from cake_hf.model.vision import family_of

TOKENS = 2
"""Of the forward; half of them far behind the others, where positions count for more. As few as can attend to one another."""
FARTHEST = 8192
Kept = dict[str, torch.Tensor]


def behaviour(model: torch.nn.Module) -> Kept:
    """The KV that a model makes of a few tokens at present, by name. Takes one forward of `TOKENS` tokens.

    Where that KV has another layout than the one that is remembered, the layout is found out anew.

    Args:
        model: of a kind whose layers we know.
    """
    ids = some_tokens(model, TOKENS, 7919)
    _, layers = run_aside(model, [ids], positions=_positions(model, ids.device))
    forget_if_unlike(model, layers)
    return {name: tensor.cpu() for name, tensor in _kept(layers)}


def behaviour_digest(seen: Kept) -> str:
    """Of what `behaviour` gave, bit for bit."""
    parts: list[bytes] = []
    for name, tensor in seen.items():
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        parts.append(bytes(host_bytes(tensor)))
    return checksum(b"".join(parts))


def _positions(model: torch.nn.Module, device: torch.device) -> torch.Tensor | None:
    """`[1, TOKENS]`: near the beginning, and far from it; None where the config does not tell how far a model goes."""
    start = _far_start(model)
    near = torch.arange(TOKENS // 2, device=device)
    return torch.cat([near, near + start]).unsqueeze(0) if start else None


def _far_start(model: Any) -> int:
    """Where the second half of the tokens is; 0 where that is not to be told from the config."""
    if family_of(model) is not None:  # such models number tokens in several dimensions
        return 0
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 4 * TOKENS:
        return 0
    return min(positions, FARTHEST) - TOKENS // 2


def _kept(layers: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for number, layer in enumerate(layers):
        for name in ("keys", "values", "indexer_keys"):
            if isinstance(tensor := getattr(layer, name, None), torch.Tensor):
                yield f"{number}.{name}", tensor
        if isinstance(layer, LinearAttentionLayer):
            yield from ((f"{number}.{name}", state) for name, state in states_of(layer).items())
