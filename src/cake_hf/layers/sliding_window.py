"""Attention within a window, or a chunk of the model's own: only the last tokens are kept."""

from __future__ import annotations

from typing import Any

import torch

from cake_hf.layers.compat import DynamicSlidingWindowLayer, drop_content

Content = tuple[torch.Tensor | None, torch.Tensor | None, int]


class SlidingWindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]  # transformers is not typed for us
    """A `DynamicSlidingWindowLayer` that can be put to the end of any chunk, and shows what a forward has brought.

    Attributes:
        watched: within a restore, whether `recent` is kept.
        recent: K and V `[batch, heads, new, head_dim]` of the last forward, all its tokens, while watched.
    """

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(sliding_window=sliding_window, **kwargs)
        self.watched = False
        self.recent: tuple[torch.Tensor, torch.Tensor] | None = None
        self._own: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    @property
    def reach(self) -> int:
        """Tokens before a place that the layer has to hold for the model to go on there."""
        return int(self.sliding_window) - 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DynamicSlidingWindowLayer.update`."""
        if self.watched:
            self.recent = key_states, value_states
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self._own = self.keys, self.values
        visible = self.reach + key_states.shape[-2]  # more is kept while the past is being recorded
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

    # What the restore needs.

    @property
    def is_own(self) -> bool:
        """Whether the content is what this layer was given by the model, and was not replaced from outside."""
        return self.keys is self._own[0] and self.values is self._own[1]

    def watch(self, *, on: bool) -> None:
        """Begin, or cease, to keep what a forward brings."""
        self.watched, self.recent = on, None

    @property
    def content(self) -> Content:
        """What `put` would put here again. Nobody writes to these tensors: each update makes new ones."""
        return self.keys, self.values, int(self.cumulative_length)

    def put(self, content: Content) -> None:
        """Hold the last tokens of this content, the last of which is token number `content[2]` of the prompt (from 1)."""
        keys, values, length = content
        self.reset()
        if keys is not None and values is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.lazy_initialization(keys, values)
                # Copies, so that nothing of the longer tensors that they may be part of stays in memory.
                self.keys, self.values = (kept[:, :, -self.reach :].clone() for kept in (keys, values))
            self._own = self.keys, self.values
        self.cumulative_length = length
