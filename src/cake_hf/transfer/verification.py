"""Checks of a value from the store while it arrives: is it the requested one, and is it as it was written?"""

from __future__ import annotations

from collections.abc import Sequence

from cake_hf.chunks.codec import ChunkMetadata, check_header, check_pieces
from cake_hf.chunks.layout import ChunkLayout


class Check:
    """The check of one value: its header once, and each of its pieces once.

    Args:
        key: the requested key.
        layout: of the value.
        header: where its header lands.
        pieces: where its pieces land, in order; fewer than all if no more are wanted.

    Attributes:
        header: as given.
    """

    def __init__(self, key: str, layout: ChunkLayout, header: memoryview, pieces: Sequence[memoryview]) -> None:
        self._key = key
        self._layout = layout
        self.header = header
        self._pieces = pieces
        self._facts: ChunkMetadata | None = None
        self._checked = 0

    @property
    def pieces_of_a_chunk(self) -> int:
        """Number of all pieces of the value."""
        return len(self._layout.pieces)

    @property
    def trusts_header(self) -> bool:
        """Whether the header was checked, and is good."""
        return self._facts is not None

    def up_to(self, end: int) -> None:
        """Checks the header and the first `end` pieces, which have arrived; call it whenever more have.

        Raises:
            CorruptChunk: they are not what was requested, or not as they were written.
        """
        if self._facts is None:
            self._facts = check_header(self.header, self._key, self._layout)
        check_pieces(self._pieces[self._checked : end], self._facts, self._checked)
        self._checked = end
