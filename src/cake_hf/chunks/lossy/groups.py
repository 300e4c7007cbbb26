"""Numbers in groups, each with a scale and a lowest value of its own: keys by channel, values by token (KIVI).

Keys have channels that are large for all tokens, values do not: so a group of keys has the numbers of one channel in a row of
tokens, and a group of values has neighbouring channels of one token. Z. Liu et al., KIVI: A Tuning-Free Asymmetric 2bit
Quantization for KV Cache (arXiv 2402.02750).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cake_hf.chunks.lossy.scales import half_above, half_below

if TYPE_CHECKING:
    from cake_hf.chunks.lossy.method import Numbers, Role, Shape


class Groups:
    """The groups of one piece.

    Args:
        shape: the shape of the piece.
        role: the role of the piece.
        tokens: of a group of keys; 0 for all.
        width: channels of a group of values; 0 for one head's.
    """

    def __init__(self, shape: Shape, role: Role, tokens: int = 0, width: int = 0) -> None:
        self._shape, self._values = shape, role.values
        if role.values and not width:
            self._rows, self._row, self._size = shape.tokens * shape.heads, shape.head_dim, shape.head_dim
        elif role.values:
            self._rows, self._row, self._size = shape.tokens, shape.channels, width
        else:
            self._rows, self._row, self._size = shape.tokens, shape.channels, tokens or shape.tokens

    @property
    def count(self) -> int:
        """Number of groups."""
        along = self._row if self._values else self._rows
        return -(-along // self._size) * (self._rows if self._values else self._row)

    def split(self, numbers: Numbers) -> Numbers:
        """Returns `[groups, size, channels]` of keys, `[rows, groups, size]` of values; the last number of a group that is
        not full is repeated, which changes neither its least nor its largest."""
        flat, axis = numbers.reshape(self._rows, self._row), int(self._values)
        missing = -flat.shape[axis] % self._size
        if missing:
            flat = np.pad(flat, [(0, 0), (0, missing)] if self._values else [(0, missing), (0, 0)], "edge")
        return flat.reshape(self._rows, -1, self._size) if self._values else flat.reshape(-1, self._size, self._row)

    def joined(self, numbers: Numbers) -> Numbers:
        """Returns what `split` was given, without what it repeated; of any dtype."""
        if self._values:
            return numbers.reshape(self._rows, -1)[:, : self._row].reshape(self._shape)
        return numbers.reshape(-1, self._row)[: self._rows].reshape(self._shape)

    def spread(self, per_group: Numbers) -> Numbers:
        """Returns one number per group in a form that goes with those of `split`."""
        return per_group.reshape(self._rows, -1, 1) if self._values else per_group.reshape(-1, 1, self._row)

    def bounds(self, numbers: Numbers, levels: int) -> tuple[Numbers, Numbers]:
        """Returns step and lowest value of each group of `split` numbers: float16 numbers, as float32.

        The lowest value is not above, and lowest value and `levels` steps not below any number of the group, so each number
        is within half a step of one of these values.
        """
        # Of zeros with different signs, numpy finds either one. The sum has the positive zero for both.
        axis, zero = 2 if self._values else 1, np.float32(0)
        lowest = half_below(numbers.min(axis, keepdims=True) + zero)
        return half_above((numbers.max(axis, keepdims=True) + zero - lowest) / np.float32(levels)), lowest


def places(numbers: Numbers, step: Numbers, lowest: Numbers) -> Numbers:
    """Returns how many steps above the lowest value each number is, not rounded; 0 where the step is 0."""
    found: Numbers = np.divide(numbers - lowest, np.where(step > 0, step, np.float32(1)), dtype=np.float32)
    return found
