"""A full-attention cache layer with spare capacity: token-major buffers that receive loads and to which decoding appends.

K and V are one buffer `[batch, capacity, heads, head_dim]` each. Attention receives the transposed view
`[batch, heads, length, head_dim]` of the first `length` tokens. The tokens of a chunk are therefore contiguous in memory, and
tokens beyond `length` (chunks that are being loaded) are invisible to the model.

On a CPU the same buffers are head-major while nothing is loaded into them, that is, for a prompt with no stored chunks and
during decoding: attention reads KV faster when a head's tokens are adjacent. The next restore that loads something makes them
token-major again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cake_hf.chunks.aligned_memory import empty_aligned
from cake_hf.layers.compat import DynamicLayer, drop_content

HEADROOM_TOKENS = 256
GROWTH = 8
"""A full buffer grows by 1/8, and at least by HEADROOM_TOKENS: one copy now and then instead of one per token."""


class TokenMajorLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed for us
    """Behaves like `DynamicLayer`; only the memory layout differs.

    `keys` and `values` may be replaced from outside, as with `DynamicLayer`; the next use copies them into the buffers.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._key_buffer: torch.Tensor | None = None
        self._value_buffer: torch.Tensor | None = None
        self._shown: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._begin(key_states, value_states, 0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `[batch, heads, new, head_dim]` states and returns all states, old and new."""
        if torch.compiler.is_dynamo_compiling():
            return self._update_in_graph(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self._take_over()
        self._key_buffer = _appended(self._key_buffer, length, key_states)
        self._value_buffer = _appended(self._value_buffer, length, value_states)
        self._show(length + key_states.shape[-2])
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove >= 0:
            super().crop(tokens_to_remove)
        elif self.is_initialized:
            self._show(max(0, self._take_over() + tokens_to_remove))

    def reset(self) -> None:
        drop_content(self)
        super().reset()
        self._key_buffer = self._value_buffer = None
        self._shown = (None, None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._per_row(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._per_row(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._per_row(lambda buffer: buffer[indices, ...])

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenMajorLayer:
        return self.copied(memo)

    # For the restore, beyond DynamicLayer.

    def copied(self, memo: dict[int, Any], tokens: int | None = None) -> TokenMajorLayer:
        """Returns a copy with its own memory. This layer's content does not change meanwhile: other threads may read it.

        Args:
            memo: the memo of `copy.deepcopy`.
            tokens: the length of the copy's content; by default the length of this layer's.
        """
        copied = type(self)()
        memo[id(self)] = copied
        if self.is_initialized:
            length = self._take_over() if tokens is None else tokens
            copied.__dict__.update(self.__dict__)
            # In the order that decoding will use, and with room for a question, so that it is copied only once.
            head_major, room = _prefers_head_major(_given(self._key_buffer)), length + HEADROOM_TOKENS
            copied._key_buffer = _room_for(_given(self._key_buffer)[:, :length], room, head_major=head_major)
            copied._value_buffer = _room_for(_given(self._value_buffer)[:, :length], room, head_major=head_major)
            copied._show(length)
        return copied

    def reserve(
        self, key_like: torch.Tensor, value_like: torch.Tensor, capacity: int, *, head_major: bool = False
    ) -> None:
        """Makes room for `capacity` tokens, so that the buffers do not move until it is used up.

        Args:
            key_like, value_like: `[1, heads, any, head_dim]` template tensors of the right dtype and device.
            capacity: in tokens.
            head_major: nothing will be loaded: head-major buffers may stay so, and new ones are head-major if that pays.
        """
        if not self.is_initialized:
            head_major = head_major and _prefers_head_major(key_like.transpose(1, 2))
            self._begin(key_like, value_like, capacity, head_major=head_major)
            return
        length = self._take_over()
        buffer = _given(self._key_buffer)
        head_major = head_major and _prefers_head_major(buffer)
        if buffer.shape[1] < capacity or (_is_head_major(buffer) and not head_major):
            self._move(length, capacity, head_major=head_major)
            self._show(length)

    def make_head_major(self) -> None:
        """Makes the buffers head-major for decoding, if that pays. Changes nothing else.

        Takes one copy of the content; `DynamicLayer` makes such a copy for each token. No loads may be under way.
        """
        buffer = self._key_buffer
        # The next update copies content that was replaced from outside.
        if buffer is None or not _prefers_head_major(buffer) or _is_head_major(buffer) or not self.is_own:
            return
        length = self._take_over()
        self._move(length, max(buffer.shape[1], length + HEADROOM_TOKENS), head_major=True)
        self._show(length)

    def make_room(self, template: Any, capacity: int, *, head_major: bool) -> None:
        """Calls `reserve` with the tensors of a template: a layer of the same kind that holds a token."""
        self.reserve(template.keys, template.values, capacity, head_major=head_major)

    def has_room(self, tokens: int) -> bool:
        """Returns whether the buffers have capacity for that many tokens, whatever the content's length."""
        return self._key_buffer is not None and self._key_buffer.shape[1] >= tokens

    def show(self, length: int) -> None:
        """Makes the first `length` tokens of the buffers the layer's content."""
        self._show(length)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens in each part of the layer, for `show_lengths`. They differ while a forward runs in it."""
        return (int(self.get_seq_length()),)

    def show_lengths(self, lengths: tuple[int, ...]) -> None:
        """Does the same as `show`, with a length for each part."""
        self._show(lengths[0])

    def move_out(self, length: int, capacity: int | None = None) -> None:
        """Moves the first `length` tokens to new buffers: loads or abandoned reads may still write to the old ones.

        Args:
            length: in tokens.
            capacity: the capacity of the new buffers, in tokens; by default unchanged.
        """
        visible = _given(self.keys).shape[-2]
        capacity = _given(self._key_buffer).shape[1] if capacity is None else capacity
        self._move(length, capacity)
        self._show(min(visible, length))

    # For the restore of a batch, whose rows are filled one by one.

    def row(self, number: int, start: int) -> TokenMajorLayer:
        """Returns an empty layer whose buffers are views of one row of this layer's, from column `start` on."""
        lent = type(self)()
        lent.dtype, lent.device, lent.is_initialized = self.dtype, self.device, True
        lent._key_buffer, lent._value_buffer = (buffer[number : number + 1, start:] for buffer in self.buffers)
        lent._show(0)
        return lent

    def copy_row(self, number: int, start: int, place: TokenMajorLayer, length: int) -> None:
        """Copies `length` tokens of a row, from column `start` on, into a layer from `row`, as its content."""
        for buffer, target in zip(self.buffers, place.buffers, strict=True):
            target[0, :length].copy_(buffer[number, start : start + length])
        place._show(length)

    def take_row(self, number: int, start: int, place: TokenMajorLayer) -> None:
        """Makes the content of a filled layer from `row` the row's content from column `start` on; zeroes earlier columns."""
        own, length = self.row(number, start), place.get_seq_length()
        if place.buffers[0].data_ptr() != own.buffers[0].data_ptr():
            # It moved out, since reads may still write to its old memory: so the other rows move, too.
            self._key_buffer, self._value_buffer = (_room_for(buffer, 0) for buffer in self.buffers)
            own = self.row(number, start)
            for buffer, target in zip(place.buffers, own.buffers, strict=True):
                target[0, :length].copy_(buffer[0, :length])
        for buffer in self.buffers:
            buffer[number, :start].zero_()  # masked, but a NaN in there would pass the mask

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """K and V, `[batch, capacity, heads, head_dim]` each."""
        return _given(self._key_buffer), _given(self._value_buffer)

    @property
    def is_own(self) -> bool:
        """Whether the content comes from this layer's own buffers and was not replaced from outside."""
        return self.keys is self._shown[0] and self.values is self._shown[1]

    def _begin(
        self, key_like: torch.Tensor, value_like: torch.Tensor, capacity: int, *, head_major: bool = False
    ) -> None:
        """Creates empty buffers for states `[batch, heads, any, head_dim]` like these."""
        self.dtype, self.device = key_like.dtype, key_like.device
        self._key_buffer = _room_for(key_like.transpose(1, 2)[:, :0], capacity, head_major=head_major)
        self._value_buffer = _room_for(value_like.transpose(1, 2)[:, :0], capacity, head_major=head_major)
        self.is_initialized = True
        self._show(0)

    def _take_over(self) -> int:
        """Copies replaced `keys` and `values` into new buffers; returns the length."""
        if not self.is_own:
            self._key_buffer = _room_for(_given(self.keys).transpose(1, 2), 0)
            self._value_buffer = _room_for(_given(self.values).transpose(1, 2), 0)
            self._show(_given(self.keys).shape[-2])
        return int(_given(self.keys).shape[-2])

    def _move(self, length: int, capacity: int, *, head_major: bool = False) -> None:
        """Moves the content to new buffers; the caller calls `_show` afterwards."""
        self._key_buffer = _room_for(_given(self._key_buffer)[:, :length], capacity, head_major=head_major)
        self._value_buffer = _room_for(_given(self._value_buffer)[:, :length], capacity, head_major=head_major)

    def _show(self, length: int) -> None:
        self.keys = _first(_given(self._key_buffer), length)
        self.values = _first(_given(self._value_buffer), length)
        self._shown = (self.keys, self.values)

    def _update_in_graph(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Updates as `DynamicLayer` does, without the buffers: some compilers reject writes to a part of a tensor they read.

        Afterwards the content counts as replaced from outside.
        """
        keys: torch.Tensor = key_states
        values: torch.Tensor = value_states
        if self.is_initialized:
            keys = torch.cat([_given(self.keys), keys], dim=-2)
            values = torch.cat([_given(self.values), values], dim=-2)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values
        return keys, values

    def _per_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.get_seq_length() > 0:
            length = self._take_over()
            self._key_buffer = _changed(_given(self._key_buffer), change)
            self._value_buffer = _changed(_given(self._value_buffer), change)
            self._show(length)


def _first(buffer: torch.Tensor, length: int) -> torch.Tensor:
    """Returns a view of the first tokens in attention's layout, `[batch, heads, length, head_dim]`.

    The batch stride of a single row is arbitrary, so it is set according to the length: cuDNN's attention keeps a plan for each
    shape and stride, and with the capacity in the stride there would be no plan for a prompt of another length.
    """
    if buffer.shape[0] > 1:
        return buffer[:, :length].transpose(1, 2)
    _, heads, head_dim = buffer.shape[1:]
    _, token, head, number = buffer.stride()
    return buffer.as_strided((buffer.shape[0], heads, length, head_dim), (length * token, head, token, number))


def _appended(buffer: torch.Tensor | None, length: int, states: torch.Tensor) -> torch.Tensor:
    buffer, states = _given(buffer), states.transpose(1, 2)
    if buffer.shape[0] != states.shape[0] or buffer.shape[2:] != states.shape[2:]:
        raise ValueError(
            f"The cache holds KV of shape {_kv_shape(buffer)}, the model brings {_kv_shape(states)} [batch, heads, head_dim]."
        )
    if torch.is_grad_enabled() and (states.requires_grad or buffer.requires_grad):
        return torch.cat([buffer[:, :length], states], dim=1)  # writing in place would break the graph
    if buffer.dtype != states.dtype:
        buffer = buffer.to(torch.promote_types(buffer.dtype, states.dtype))
    end = length + states.shape[1]
    if end > buffer.shape[1] or buffer.requires_grad:  # tensors that an autograd graph has saved must not change
        capacity = end + max(HEADROOM_TOKENS, end // GROWTH)
        buffer = _room_for(buffer[:, :length], capacity, head_major=_is_head_major(buffer))
    buffer[:, length:end].copy_(states)
    return buffer


def _changed(buffer: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Returns a buffer with its rows changed, in the same memory order: beam search changes rows with each token."""
    if _is_head_major(buffer):
        return change(buffer.transpose(1, 2)).transpose(1, 2)
    return change(buffer)


def _room_for(content: torch.Tensor, capacity: int, *, head_major: bool = False) -> torch.Tensor:
    """Returns a new buffer of at least `capacity` tokens that starts with the content `[batch, length, heads, head_dim]`.

    Its dimensions are in the content's order in any case; `head_major` sets the order in memory.

    It is created outside inference mode, so that any thread can later write to it in any mode.
    """
    batch, length, heads, head_dim = content.shape
    if content.requires_grad and torch.is_grad_enabled():
        return content
    with torch.inference_mode(False), torch.no_grad():
        tokens = max(length, capacity)
        shape = (batch, heads, tokens, head_dim) if head_major else (batch, tokens, heads, head_dim)
        buffer = empty_aligned(shape, content.dtype, content.device)
        buffer = buffer.transpose(1, 2) if head_major else buffer
        buffer[:, :length].copy_(content)
    return buffer


def _prefers_head_major(buffer: torch.Tensor) -> bool:
    """Returns whether head-major order pays. GPU kernels take either order; with one head both are the same."""
    return buffer.device.type == "cpu" and buffer.shape[2] > 1


def _is_head_major(buffer: torch.Tensor) -> bool:
    return buffer.stride(2) > buffer.stride(1)


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise RuntimeError("The layer has no content yet.")
    return tensor


def _kv_shape(buffer: torch.Tensor) -> list[int]:
    return [buffer.shape[0], *buffer.shape[2:]]
