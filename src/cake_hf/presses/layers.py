"""The layers of a pressed cache: they keep fewer entries than they have seen tokens, and take part in attention."""

from __future__ import annotations

from typing import Any

import torch

from cake_hf.errors import CakeError
from cake_hf.layers.compat import DynamicLayer
from cake_hf.presses.attention import Attended, AttentionCall


class PressedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed for us
    """Keeps keys and values `[1, heads, kept, head_dim]`; what comes after the press is appended.

    A method that does more while the model decodes overrides `update` (what is kept of new tokens) or `attend` (how queries
    use it), and names the tensors it keeps in `state`.

    Args:
        keys, values: what is kept of the prefix.
        seen: tokens of the prefix, kept or not: the position of the next token.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.seen = keys, values, seen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends the states of new tokens; returns what attention is to use."""
        if key_states.shape[0] != 1:
            raise CakeError(
                f"A pressed cache goes on with one prompt, and it was called with {key_states.shape[0]} rows."
            )
        self.seen += key_states.shape[-2]
        self.append(key_states, value_states)
        return self.keys, self.values

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Adds the states of new tokens to what is kept."""
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)

    def drop(self, start: int, end: int) -> None:
        """Drops the entries of some places."""
        self.keys, self.values = (
            torch.cat([states[:, :, :start], states[:, :, end:]], dim=-2) for states in (self.keys, self.values)
        )

    def attend(self, call: AttentionCall) -> Attended:
        """Computes the attention of new tokens."""
        attention, query, keys, values, mask = call
        return attention(query, keys, values, self.own_mask(query, keys, mask))

    def own_mask(self, query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the model's mask if nothing of the prefix is missing in this layer and the first, or else one that fits."""
        new, total = query.shape[-2], keys.shape[-2]
        fits = new in (1, total) if mask is None else mask.shape[-1] == total
        return mask if fits and total == self.seen else causal_mask(query, total)

    def state(self) -> list[torch.Tensor]:
        """Returns all tensors that this layer keeps, for counting their bytes."""
        return [self.keys, self.values]

    @property
    def entries(self) -> float:
        """Entries that are kept, the mean over the heads."""
        return float(self.keys.shape[-2])

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Returns the number of keys in the next forward, and the position that a mask counts them from."""
        new = query_length if isinstance(query_length, int) else len(query_length)  # older versions pass positions
        kept = int(self.entries)
        return kept + new, self.seen - kept


class RaggedLayer(PressedLayer):
    """Each head keeps entries of its own, and may keep more of them than others.

    Args:
        keys, values: of each head, `[1, 1, kept of this head, head_dim]`.
        seen: as for `PressedLayer`.
    """

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], seen: int) -> None:
        super().__init__(keys[0][:, :, :0], values[0][:, :, :0], seen)
        self.head_keys, self.head_values = keys, values

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for kept, new in ((self.head_keys, key_states), (self.head_values, value_states)):
            kept[:] = [torch.cat([one, new[:, head : head + 1]], dim=-2) for head, one in enumerate(kept)]

    def attend(self, call: AttentionCall) -> Attended:
        """Computes the attention of each head's group of queries with the model's function, one after the other."""
        call.attention.require_plain("A press with a choice per head")
        groups = call.query.chunk(len(self.head_keys), dim=1)
        outputs = [
            call.attention(group, key, value, self.own_mask(group, key, call.mask))[0]
            for group, key, value in zip(groups, self.head_keys, self.head_values, strict=True)
        ]
        return torch.cat(outputs, dim=2), None

    def state(self) -> list[torch.Tensor]:
        return [*self.head_keys, *self.head_values]

    @property
    def entries(self) -> float:
        return sum(one.shape[-2] for one in self.head_keys) / len(self.head_keys)


def causal_mask(query: torch.Tensor, total: int) -> torch.Tensor | None:
    """Returns an additive mask `[1, 1, new, total]`: new tokens see all that was kept, and of each other the past."""
    new = query.shape[-2]
    if new == 1:
        return None
    mask = torch.full((new, total), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return mask.triu(total - new + 1)[None, None]
