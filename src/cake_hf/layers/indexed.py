"""A layer for full attention behind an indexer, which keeps a small key of its own for each token."""

from __future__ import annotations

from typing import Any

import torch

from cake_hf.layers.token_major import TokenMajorLayer


class IndexedLayer(TokenMajorLayer):
    """Behaves like `DynamicIndexedLayer`. The indexer's keys are the K of a second layer with one head and an empty V."""

    indexer_position_ids: torch.Tensor | None = None
    """Used by some models, which are computed plainly; see `support`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._indexer = TokenMajorLayer()

    @property
    def is_indexer_initialized(self) -> bool:
        """Whether the indexer holds keys."""
        return bool(self._indexer.is_initialized)

    @property
    def indexer_keys(self) -> torch.Tensor | None:
        """The indexer's keys `[batch, tokens, index_head_dim]`; None before the first ones."""
        return self._indexer.keys.squeeze(1) if self._indexer.is_initialized else None

    def update_indexer(self, indexer_key_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Appends `[batch, new, index_head_dim]` keys and returns all keys."""
        keys = indexer_key_states.unsqueeze(1)
        return self._indexer.update(keys, keys[..., :0])[0].squeeze(1)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._indexer.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self._indexer.reset()
        self.indexer_position_ids = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._indexer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._indexer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._indexer.batch_select_indices(indices)

    def offload(self) -> None:
        super().offload()
        self._indexer.offload()

    def prefetch(self) -> None:
        super().prefetch()
        self._indexer.prefetch()

    # For the restore.

    def copied(self, memo: dict[int, Any], tokens: int | None = None) -> IndexedLayer:
        copied: IndexedLayer = super().copied(memo, tokens)
        copied._indexer = self._indexer.copied(memo, tokens)
        return copied

    def make_room(self, template: Any, capacity: int, *, head_major: bool) -> None:
        super().make_room(template, capacity, head_major=head_major)
        if template.is_indexer_initialized:
            keys = template.indexer_keys.unsqueeze(1)
            self._indexer.reserve(keys, keys[..., :0], capacity)

    def show(self, length: int) -> None:
        super().show(length)
        if self._indexer.is_initialized:
            self._indexer.show(length)

    @property
    def lengths(self) -> tuple[int, ...]:
        return (*super().lengths, *self._indexer.lengths)

    def show_lengths(self, lengths: tuple[int, ...]) -> None:
        super().show_lengths(lengths[:1])
        if self._indexer.is_initialized:
            self._indexer.show_lengths(lengths[1:])

    def move_out(self, length: int, capacity: int | None = None) -> None:
        super().move_out(length, capacity)
        if self._indexer.is_initialized:
            self._indexer.move_out(length, capacity)

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """K, V and, if the indexer holds any, its keys, `[batch, capacity, heads, head_dim]` each."""
        return super().buffers + (self._indexer.buffers[:1] if self._indexer.is_initialized else ())

    @property
    def is_own(self) -> bool:
        return super().is_own and self._indexer.is_own
