"""The canonical schedule: in which pieces a prompt is run, given its cuts.

From each cut the grid starts anew: full chunks, then what is left up to the next cut, the *tail*, in one forward. Tokens
between cuts that are one token apart are run one by one, as decoding runs them. So the schedule is a function of the cuts
alone, and with it every bit of the KV.

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
        start, end: tokens `start` to `end - 1`.
        singly: they are run one by one, not in one forward.
    """

    start: int
    end: int
    singly: bool = False

    @property
    def tokens(self) -> int:
        """How many they are."""
        return self.end - self.start

    @property
    def forwards(self) -> list[tuple[int, int]]:
        """The forwards that make it, each with its first token and the one behind its last."""
        if not self.singly:
            return [(self.start, self.end)]
        return [(at, at + 1) for at in range(self.start, self.end)]

    def fills(self, size: int) -> bool:
        """Whether it is a full chunk of that many tokens, run in one forward."""
        return self.tokens == size and not self.singly

    def shifted(self, by: int) -> Block:
        """The same block, counted from another token on."""
        return Block(self.start + by, self.end + by, self.singly)


def checked_cuts(boundaries: Iterable[int], tokens: int) -> list[int]:
    """Declared cuts in ascending order, each once.

    Args:
        boundaries: numbers of tokens from a prompt's start.
        tokens: of that prompt.

    Raises:
        TypeError: they are no whole numbers.
        ValueError: one of them is outside the prompt.
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
    """The blocks of tokens `start` to `end - 1`, both of which are ends of pieces.

    Args:
        start: a place where the grid starts.
        end: of the last piece.
        cuts: in ascending order; those that are not between start and end do not count.
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


def tail_ends(named: Iterable[Block], size: int) -> list[int]:
    """The cuts that make these blocks, where chunks have that size: the ends of all other forwards."""
    return [end for block in named if not block.fills(size) for _, end in block.forwards]


def suffix_start(start: int, end: int, cuts: Sequence[int], size: int, leave: int) -> int:
    """Where the last piece of a prompt begins: as far behind as it can and still have `leave` tokens.

    Args:
        start: first new token, where the grid starts.
        end: number of the prompt's tokens.
        cuts: in ascending order.
        size: tokens of a full chunk.
        leave: tokens; 0 if nothing need be left.
    """
    reach = max(start, end - leave)
    before = bisect_right(cuts, reach)
    grid = max(start, cuts[before - 1]) if before else start
    return grid + (reach - grid) // size * size
