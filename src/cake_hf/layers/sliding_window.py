"""A layer for attention within a sliding window, or within the model's own attention chunks: it keeps only the last tokens."""

from __future__ import annotations

from typing import Any

import torch

from cake_hf.layers.compat import DynamicSlidingWindowLayer, counting_writes, drop_content

Content = tuple[torch.Tensor | None, torch.Tensor | None, int]


class SlidingWindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]  # transformers is not typed for us
    """A `DynamicSlidingWindowLayer` that can be set to the end of any chunk, and can keep all KV of the last forward.

    Attributes:
        watched: during a restore, whether `recent` is kept.
        recent: K and V `[batch, heads, new, head_dim]` of all tokens of the last forward, while watched.
    """

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(sliding_window=sliding_window, **kwargs)
        self.watched = False
        self.recent: tuple[torch.Tensor, torch.Tensor] | None = None
        self._own: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    @property
    def reach(self) -> int:
        """The number of tokens before a position that the layer must hold for the model to continue there."""
        return int(self.sliding_window) - 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Does the same as `DynamicSlidingWindowLayer.update`."""
        if self.watched:
            self.recent = key_states, value_states
        with counting_writes():
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        self._own = self.keys, self.values
        visible = self.reach + key_states.shape[-2]  # the layer keeps more while the past is being recorded
        return keys[:, :, -visible:], values[:, :, -visible:]

    def crop(self, tokens_to_remove: int) -> None:
        own = self.is_own
        super().crop(tokens_to_remove)
        if own:
            self._own = self.keys, self.values

    def reset(self) -> None:
        drop_content(self)
        super().reset()
        self._own = None, None

    # For the restore.

    @property
    def is_own(self) -> bool:
        """Whether the content comes from this layer's own updates and was not replaced from outside."""
        return self.keys is self._own[0] and self.values is self._own[1]

    def watch(self, *, on: bool) -> None:
        """Starts or stops keeping each forward's KV in `recent`."""
        self.watched, self.recent = on, None

    @property
    def content(self) -> Content:
        """The content that `put` restores. These tensors are never written to: each update creates new ones."""
        return self.keys, self.values, int(self.cumulative_length)

    def put(self, content: Content) -> None:
        """Sets the layer to the last tokens of this content, the last of which is token number `content[2]` (from 1)."""
        keys, values, length = content
        self.reset()
        if keys is not None and values is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.lazy_initialization(keys, values)
                # Copies, so that the longer tensors of which these may be views do not stay in memory.
                self.keys, self.values = (kept[:, :, -self.reach :].clone() for kept in (keys, values))
            self._own = self.keys, self.values
        self.cumulative_length = length
