"""The values that every store is given and must return: chunk files of random KV, and a cache's buffers to read them into."""

from __future__ import annotations

import mmap
import secrets
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from cake_hf.chunks.codec import ChunkMetadata, checksums, encode_header, header_size
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.errors import CakeError
from cake_hf.keys import canonical, namespace_digest

HEADS, HEAD_DIM = 4, 128


@dataclass(frozen=True)
class StoreSettings:
    """The settings of one run.

    Attributes:
        chunks: read in each round.
        layers: of a chunk; with 512 tokens, each layer has 1 MiB of it.
        tokens: of a chunk.
        threads: the most concurrent readers; one alone is measured as well.
        repeats: rounds; in each, every arm reads all chunks once.
    """

    chunks: int = 16
    layers: int = 16
    tokens: int = 512
    threads: int = 2
    repeats: int = 7

    def as_dict(self) -> dict[str, object]:
        """Returns JSON-ready values."""
        return asdict(self)

    def facts(self) -> dict[str, object]:
        """Returns the metadata of the namespace, as a pack has it."""
        return {"chunk_size": self.tokens, "format": "bench", "layout": {}, "model": {"class": "random"}}


class Values:
    """Chunks by their number, and a place for each to be read into.

    The buffers are laid out as in a cache: the pieces of one layer lie side by side, those of one chunk do not. All memory
    has been written to before anything is timed.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: StoreSettings) -> None:
        kinds = ("keys", "values")
        pieces = [
            Piece(f"layers.{n}.{kind}", HEADS, HEAD_DIM, torch.bfloat16, n)
            for n in range(settings.layers)
            for kind in kinds
        ]
        self.layout = ChunkLayout(settings.tokens, tuple(pieces))
        self.count = settings.chunks
        self.namespace = namespace_digest(canonical({**settings.facts(), "salt": ""}))
        # New keys for each run: the store may be a user's own.
        self.keys = [secrets.token_hex(20) for _ in range(self.count)]
        self.files = [self._file(index) for index in range(self.count)]
        self.nbytes = len(self.files[0])
        sizes = [header_size(self.layout), *self.layout.sizes]
        self._spans = list(pairwise(accumulate(sizes, initial=0)))
        self._areas = [_memory(size * self.count) for size in sizes]
        self.parts = [
            [area[size * n : size * (n + 1)] for area, size in zip(self._areas, sizes, strict=True)]
            for n in range(self.count)
        ]
        whole = _memory(self.nbytes * self.count)
        self.flat = [whole[self.nbytes * n : self.nbytes * (n + 1)] for n in range(self.count)]
        """Memory in one piece for each chunk, for clients that need that."""

    @property
    def total(self) -> int:
        """Bytes of all chunks."""
        return self.nbytes * self.count

    def clear(self) -> None:
        """Forgets what was read."""
        for area in self._areas:
            np.frombuffer(area, np.uint8).fill(0)

    def check(self, what: str) -> None:
        """Checks that all chunks are in the buffers.

        Raises:
            WrongBytes: one is not.
        """
        for number, (file, parts) in enumerate(zip(self.files, self.parts, strict=True)):
            whole, read = np.frombuffer(file, np.uint8), [np.frombuffer(part, np.uint8) for part in parts]
            if not all(
                np.array_equal(part, whole[begin:end]) for part, (begin, end) in zip(read, self._spans, strict=True)
            ):
                raise WrongBytes(f"{what}: chunk {number} did not come back as it was written.")

    def _file(self, index: int) -> bytes:
        payload = secrets.token_bytes(self.layout.nbytes)
        parent = self.keys[index - 1] if index else self.namespace
        facts = ChunkMetadata(
            self.keys[index], parent, index, self.namespace, "random", checksums(payload, self.layout)
        )
        return encode_header(self.layout, facts) + payload


class WrongBytes(CakeError):
    """A store returned something else than it was given."""


def _memory(nbytes: int) -> memoryview:
    """Memory that begins on a page and has been written to."""
    area = memoryview(mmap.mmap(-1, nbytes))
    area[:] = bytes(nbytes)
    return area
