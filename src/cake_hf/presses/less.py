"""LESS: Get More with LESS, Synthesizing Recurrence with KV Cache Compression (Dong et al., ICML 2024, arXiv 2402.09398)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu

from cake_hf.errors import CakeError
from cake_hf.presses.attention import Attended, AttentionCall
from cake_hf.presses.layers import PressedLayer, causal_mask
from cake_hf.presses.press import Prefix, Press, check_share
from cake_hf.presses.window import Recorded

PARTS = ("query_in", "query_out", "key_in", "key_out", "key_mix")


@dataclass(frozen=True)
class Kernels:
    """The trained kernels of one layer; `training/train_less.py` makes those of a model.

    Attributes:
        query_in, query_out: `[heads, head_dim, hidden]` and `[heads, hidden, rank]`.
        key_in, key_out, key_mix: the same for the heads that keep keys, and `[heads, rank, rank]`.
    """

    query_in: torch.Tensor
    query_out: torch.Tensor
    key_in: torch.Tensor
    key_out: torch.Tensor
    key_mix: torch.Tensor

    def on(self, device: torch.device) -> Kernels:
        """Returns the kernels on a device."""
        return Kernels(*(getattr(self, part).to(device) for part in PARTS))

    def of_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Returns phi `[..., heads, tokens, rank]` of queries: `|gelu(gelu(q W1) W2)|`."""
        return gelu(gelu(queries.float() @ self.query_in) @ self.query_out).abs()

    def of_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Returns psi `[..., heads, tokens, rank]` of keys: `|gelu(gelu(k W1) W2) W3|`."""
        return (gelu(gelu(keys.float() @ self.key_in) @ self.key_out) @ self.key_mix).abs()


def save_kernels(path: str | Path, kernels: list[Kernels]) -> None:
    """Writes the kernels of all layers to a safetensors file, in bfloat16."""
    named = {f"{number}.{part}": getattr(one, part) for number, one in enumerate(kernels) for part in PARTS}
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in named.items()}, path)


def load_kernels(path: str | Path) -> list[Kernels]:
    """Reads what `save_kernels` wrote."""
    found = load_file(path)
    layers = len(found) // len(PARTS)
    return [Kernels(*(found[f"{number}.{part}"].float() for part in PARTS)) for number in range(layers)]


@dataclass(frozen=True)
class LESS(Press):
    """Keeps few entries, and of all evicted ones a state of fixed size, from which attention gets what they would have added.

    With phi and psi of `Kernels`, evicting an entry adds `psi(k)^T v` to H and `psi(k)` to z, and attention is
    `(phi(q) H + sum exp(q k / sqrt d) v) / (phi(q) z + sum exp(q k / sqrt d))` with the sums over kept entries (eq. 4 of the
    paper). Kept are the first tokens, those with the most attention of the last queries, and the most recent ones; while the
    model decodes, the oldest of the recent ones is evicted for each new token. Memory: a share `keep` of the KV, and
    `rank * (head_dim + 1)` floats per head. If nothing is evicted, the output is bit for bit that of the full cache.

    Args:
        kernels: the kernels of each layer; empty for none, which is plain eviction.
        keep: share of the prompt's entries that are kept, half of them for the attention they have.
        first: tokens at the start that are never evicted.
        window: queries that are asked.
    """

    kernels: list[Kernels] = field(repr=False)
    keep: float = 0.25
    first: int = 4
    window: int = 32
    needs_queries = True

    def __post_init__(self) -> None:
        check_share("keep", self.keep)

    def layers(self, prefix: Prefix) -> list[PressedLayer]:
        if self.kernels and len(self.kernels) != len(prefix.keys):
            raise CakeError(
                f"The kernels are those of {len(self.kernels)} layers, and this model has {len(prefix.keys)}."
            )
        return super().layers(prefix)

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        keys, values, tokens = prefix.keys[number], prefix.values[number], prefix.tokens
        is_kept, recent = kept_entries(prefix.window[number], keys, self.keep, self.first)
        kept, gone = _split(keys, is_kept), _split(keys, ~is_kept)
        kernels = self.kernels[number].on(keys.device) if self.kernels else None
        layer = LessLayer(kept, _split(values, is_kept), tokens, kept.shape[-2] - recent, recent, kernels)
        layer.absorb(gone, _split(values, ~is_kept))
        return layer


def kept_entries(window: Recorded, keys: torch.Tensor, keep: float, first: int) -> tuple[torch.Tensor, int]:
    """Returns which entries of a prefix are kept, bool `[key heads, tokens]`, and how many of them as the most recent ones.

    Args:
        window: the last queries of the prefix.
        keys: `[1, key heads, tokens, head_dim]` of the prefix.
        keep, first: as for `LESS`.
    """
    tokens = keys.shape[-2]
    count = min(max(round(keep * tokens), first + 1), tokens)
    recent = max((count - first + 1) // 2, 0)
    attention = window.by_head(keys)
    attention[:, :first] = float("inf")
    attention[:, tokens - recent :] = -1  # not among those that are never evicted
    fixed = attention.topk(count - recent, dim=-1).indices
    is_kept = torch.zeros_like(attention, dtype=torch.bool).scatter_(1, fixed, value=True)
    is_kept[:, tokens - recent :] = True
    return is_kept, recent


class LessLayer(PressedLayer):
    """Keeps entries beside the state of those that were evicted.

    Args:
        keys, values, seen: as for `PressedLayer`; the first `fixed` entries are never evicted.
        fixed: number of entries that are never evicted.
        recent: number of other entries.
        kernels: the kernels of this layer; None for plain eviction.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, seen: int, fixed: int, recent: int, kernels: Kernels | None
    ) -> None:
        super().__init__(keys, values, seen)
        self.fixed, self.recent, self.kernels = fixed, recent, kernels
        self.evicted = 0
        rank = 0 if kernels is None else kernels.key_mix.shape[-1]
        heads = keys.shape[1]
        self.outer = torch.zeros(1, heads, rank, values.shape[-1], device=keys.device)
        self.norm = torch.zeros(1, heads, rank, 1, device=keys.device)

    def absorb(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds evicted entries `[1, heads, entries, head_dim]` to the state."""
        self.evicted += keys.shape[-2]
        if self.kernels is not None and keys.shape[-2]:
            mapped = self.kernels.of_keys(keys).transpose(-1, -2)
            self.outer = self.outer + mapped @ values.float()
            self.norm = self.norm + mapped.sum(dim=-1, keepdim=True)

    def attend(self, call: AttentionCall) -> Attended:
        if self.kernels is None or not self.evicted:
            result = super().attend(call)
        else:
            attention, query, keys, values, _ = call
            attention.require_plain("LESS")
            hidden = causal_mask(query, keys.shape[-2])
            output = with_state(self.kernels, query, keys, values, self.outer, self.norm, attention.scaling, hidden)
            result = output.transpose(1, 2).to(query.dtype).contiguous(), None
        self._evict()
        return result

    def _evict(self) -> None:
        """Moves the entries that are recent no more into the state."""
        over = self.keys.shape[-2] - self.fixed - self.recent
        if over > 0:
            end = self.fixed + over
            self.absorb(self.keys[:, :, self.fixed : end], self.values[:, :, self.fixed : end])
            self.drop(self.fixed, end)

    def state(self) -> list[torch.Tensor]:
        return [*super().state(), self.outer, self.norm]


def with_state(
    kernels: Kernels,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    outer: torch.Tensor,
    norm: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Returns attention `[1, heads, new, head_dim]`, float32, over kept entries and the state of the others.

    Args:
        kernels: the kernels of the layer.
        query: `[1, heads, new, head_dim]`.
        keys, values: what is kept, `[1, key heads, entries, head_dim]`.
        outer, norm: H `[1, key heads, rank, head_dim]` and z `[1, key heads, rank, 1]`.
        scaling: the scaling of the products.
        mask: additive, over kept entries; None to see all.
    """
    groups = query.shape[1] // keys.shape[1]
    keys, values, outer, norm = (
        states.float().repeat_interleave(groups, dim=1) for states in (keys, values, outer, norm)
    )
    products = query.float() @ keys.transpose(-1, -2) * scaling
    products = products if mask is None else products + mask
    kept = products.logsumexp(dim=-1, keepdim=True)
    mapped = kernels.of_queries(query)
    total = torch.logaddexp(kept, (mapped @ norm).clamp_min(1e-20).log())
    return (products - total).exp() @ values + (mapped @ outer) * (-total).exp()


def _split(states: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Returns chosen entries, of each head as many; `chosen` is `[heads, tokens]`."""
    found: torch.Tensor = states[0][chosen].unflatten(0, (states.shape[1], -1))[None]
    return found
