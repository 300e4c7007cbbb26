"""The known content of a cache: the leading blocks of one prompt, all from the canonical schedule."""

from __future__ import annotations

from collections.abc import Sequence

from cake_hf.blocks import Block, tail_ends


class HeldBlocks:
    """The known blocks of one cache.

    Attributes:
        blocks: in order, from the prompt's first token.
        keys: of these.
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
        """Whether a forward ended at that place, which must not be after the end."""
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
