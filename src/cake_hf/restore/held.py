"""What a cache holds, as far as it is known: the leading blocks of one prompt, all from the canonical schedule."""

from __future__ import annotations

from collections.abc import Sequence

from cake_hf.blocks import Block, tail_ends


class Held:
    """Of one cache.

    Attributes:
        blocks: in order, from the prompt's first token on.
        keys: of these.
    """

    def __init__(self, blocks: Sequence[Block] = (), keys: Sequence[str] = ()) -> None:
        self.blocks = list(blocks)
        self.keys = list(keys)

    @property
    def end(self) -> int:
        """How many leading tokens are known."""
        return self.blocks[-1].end if self.blocks else 0

    @property
    def ends(self) -> list[int]:
        """Of each block the number of tokens up to its end."""
        return [block.end for block in self.blocks]

    def cuts(self, size: int) -> list[int]:
        """The cuts that make these blocks, where chunks have that size."""
        return tail_ends(self.blocks, size)

    def is_edge(self, place: int) -> bool:
        """Whether a forward ended at that place, which is not behind the end."""
        return any(block.end == place or (block.singly and block.start < place < block.end) for block in self.blocks)

    def append(self, blocks: Sequence[Block], keys: Sequence[str]) -> None:
        """Blocks that follow, counted from the prompt's first token on."""
        self.blocks += blocks
        self.keys += keys

    def crop(self, length: int) -> None:
        """No more than so many tokens are held."""
        while self.end > length:
            self.blocks.pop()
            self.keys.pop()

    def forget(self) -> None:
        """Nothing is known any more."""
        self.blocks, self.keys = [], []

    def copy(self) -> Held:
        """One that changes by itself."""
        return Held(self.blocks, self.keys)
