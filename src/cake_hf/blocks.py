"""The canonical schedule: the pieces in which a prompt is run, given its cuts.

The grid starts anew at each cut: full chunks, then the remaining tokens up to the next cut, the *tail*, in one forward. Tokens
between cuts that are one token apart are run one by one, as in decoding. The schedule is therefore a function of the cuts
alone, and so is every bit of the KV.

    cuts           |                          20         25 26 27 28
    chunks of 8    | 0..8 | 8..16 |  16..20   |  20..25  |25|26|27|28
                   | chunk| chunk |  tail     |  tail    | single   |

A *block* is what is stored under one key: a chunk, a tail, or up to a chunk's number of single tokens in a row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import index
from typing import NamedTuple


class Block(NamedTuple):
    """Consecutive tokens of a prompt that are stored under one key.

    Attributes:
        start, end: the block has tokens `start` to `end - 1`.
        singly: whether the tokens are run one by one instead of in one forward.
    """

    start: int
    end: int
    singly: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens in the block."""
        return self.end - self.start

    @property
    def forwards(self) -> list[tuple[int, int]]:
        """The forwards that produce the block, each as a pair (first token, last token + 1)."""
        if not self.singly:
            return [(self.start, self.end)]
        return [(at, at + 1) for at in range(self.start, self.end)]

    def fills(self, size: int) -> bool:
        """Returns whether the block is a full chunk of `size` tokens, run in one forward."""
        return self.tokens == size and not self.singly

    def shifted(self, by: int) -> Block:
        """Returns the same block, its positions shifted by `by` tokens."""
        return Block(self.start + by, self.end + by, self.singly)


def checked_cuts(boundaries: Iterable[int], tokens: int) -> list[int]:
    """Returns the declared cuts in ascending order, without duplicates.

    Args:
        boundaries: numbers of tokens from the prompt's start.
        tokens: number of tokens in the prompt.

    Raises:
        TypeError: the boundaries are not whole numbers.
        ValueError: a boundary is outside the prompt.
    """
    try:
        cuts = sorted({index(one) for one in boundaries})
    except TypeError:
        raise TypeError("Boundaries are whole numbers of tokens, counted from the prompt's start.") from None
    for cut in cuts:
        if not 0 < cut <= tokens:
            raise ValueError(
                f"Boundary {cut:,} is outside the prompt, which has {tokens:,} tokens; pass boundaries of this prompt, from 1 "
                "to its length."
            )
    return cuts


def blocks(start: int, end: int, cuts: Iterable[int], size: int) -> list[Block]:
    """Returns the blocks of tokens `start` to `end - 1`; both positions must be edges of blocks.

    Args:
        start: a position at which the grid starts.
        end: end of the last block.
        cuts: in ascending order; those not strictly between start and end are ignored.
        size: tokens of a full chunk.
    """
    found: list[Block] = []
    edges = [start, *(cut for cut in cuts if start < cut < end), end] if end > start else []
    for first, last in pairwise(edges):
        for at in range(first, last, size):
            stop = min(at + size, last)
            before = found[-1] if found else None
            if stop - at > 1 or size == 1:
                found.append(Block(at, stop))
            elif before is not None and before.singly and before.tokens < size:
                found[-1] = Block(before.start, stop, singly=True)
            else:
                found.append(Block(at, stop, singly=True))
    return found


def full_chunks(named: Sequence[Block], size: int) -> frozenset[int]:
    """Returns the numbers of those blocks that are full chunks of `size` tokens, each run in one forward."""
    return frozenset(number for number, block in enumerate(named) if block.fills(size))


def tail_ends(named: Iterable[Block], size: int) -> list[int]:
    """Returns the cuts that produce these blocks: the ends of all forwards except those of full chunks of `size` tokens."""
    return [end for block in named if not block.fills(size) for _, end in block.forwards]


def suffix_start(start: int, end: int, cuts: Sequence[int], size: int, leave: int) -> int:
    """Returns where the suffix of a prompt starts: as far back as possible with at least `leave` tokens remaining.

    Args:
        start: first new token, where the grid starts.
        end: number of tokens in the prompt.
        cuts: in ascending order.
        size: tokens of a full chunk.
        leave: minimum number of tokens in the suffix; may be 0.
    """
    reach = max(start, end - leave)
    before = bisect_right(cuts, reach)
    grid = max(start, cuts[before - 1]) if before else start
    return grid + (reach - grid) // size * size


class HeldBlocks:
    """The known blocks of one cache.

    Attributes:
        blocks: in order, from the prompt's first token.
        keys: their keys.
    """

    def __init__(self, blocks: Sequence[Block] = (), keys: Sequence[str] = ()) -> None:
        self.blocks = list(blocks)
        self.keys = list(keys)

    @property
    def end(self) -> int:
        """The number of known leading tokens."""
        return self.blocks[-1].end if self.blocks else 0

    @property
    def ends(self) -> list[int]:
        """For each block, the number of tokens up to its end."""
        return [block.end for block in self.blocks]

    def cuts(self, size: int) -> list[int]:
        """Returns the cuts that lead to these blocks with chunks of `size` tokens."""
        return tail_ends(self.blocks, size)

    def is_edge(self, place: int) -> bool:
        """Returns whether a forward ended at that place, which must not be after the end."""
        return any(block.end == place or (block.singly and block.start < place < block.end) for block in self.blocks)

    def append(self, blocks: Sequence[Block], keys: Sequence[str]) -> None:
        """Adds the blocks that follow, counted from the prompt's first token."""
        self.blocks += blocks
        self.keys += keys

    def crop(self, length: int) -> None:
        """Drops the blocks that extend beyond `length` tokens."""
        while self.end > length:
            self.blocks.pop()
            self.keys.pop()

    def forget(self) -> None:
        """Drops all blocks."""
        self.blocks, self.keys = [], []

    def copy(self) -> HeldBlocks:
        """Returns an independent copy."""
        return HeldBlocks(self.blocks, self.keys)
