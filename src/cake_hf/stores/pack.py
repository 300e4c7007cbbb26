"""A pack as a read-only store: every byte is checked against the manifest before it is used.

A `PackSource` provides the files, from a folder or the Hub. The manifest is read once, when the pack is opened; after that,
lookups need no further reads, and chunks are read on demand.
"""

from __future__ import annotations

import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cake_hf.errors import CorruptChunk, StoreError
from cake_hf.keys import canonical
from cake_hf.stores.base import Part, Store, scatter, total_bytes
from cake_hf.stores.manifest import BLOCK_BYTES, MANIFEST, MAX_MANIFEST_BYTES, PackChunk, chunk_path, parse_manifest
from cake_hf.stores.mismatch import why_not
from cake_hf.stores.specs import expanded

FIRST_READ = 2**25
"""Bytes of a chunk that are read first; each further read doubles the bytes read so far."""


class PackSource(ABC):
    """The source of a pack's files. Many threads may use it at once.

    Attributes:
        range_seconds: approximate time that fetching a part of a file takes beyond its share of the whole.
    """

    range_seconds: float

    @abstractmethod
    def __str__(self) -> str:
        """Returns the pack's name for people."""

    @abstractmethod
    def manifest(self, most: int) -> bytes:
        """Returns the manifest, reading at most `most + 1` bytes.

        Raises:
            StoreError: there is no manifest, or it cannot be read.
        """

    @abstractmethod
    def fetch(self, path: str, parts: Sequence[memoryview], offset: int) -> None:
        """Fills the buffers, in order, with the file's bytes from `offset` on, which are not checked yet.

        Raises:
            CorruptChunk: the file ends too early.
            StoreError: the file cannot be read.
        """


class PackStore(Store):
    """A read-only store with the chunks and snapshots of a pack.

    Args:
        source: source of the files; `open_folder_pack` and `cake_hf.stores.hub.open_hub_pack` make one from a path or a URL.

    Attributes:
        manifest: the pack's manifest.

    Raises:
        StoreError: the manifest cannot be read or is invalid, or the package for digests is not installed.
    """

    reads_ranges = True
    read_only = True

    def __init__(self, source: PackSource) -> None:
        digest_of([])  # fails at once if the package for digests is missing
        self.source = source
        self.range_seconds = source.range_seconds
        self.manifest = parse_manifest(source.manifest(MAX_MANIFEST_BYTES))

    def __repr__(self) -> str:
        return f"PackStore({str(self.source)!r})"

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return [key in self.manifest.by_key for key in keys]

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        chunk = self.manifest.by_key.get(key)
        if chunk is None:
            return None
        if total_bytes(parts) != chunk.size:
            raise CorruptChunk(f"Chunk {key} has {chunk.size} bytes, {total_bytes(parts)} were expected.")
        self.source.fetch(chunk_path(key), parts, 0)
        self._refuse_other(digest_of(parts), chunk.digest, chunk)
        return chunk.size

    def read(self, key: str) -> bytearray | None:
        """Reads like the contract, but takes at most twice the file's actual size in memory, whatever the manifest claims."""
        chunk = self.manifest.by_key.get(key)
        if chunk is None:
            return None
        value = bytearray()
        while len(value) < chunk.size:
            piece = bytearray(min(chunk.size - len(value), max(len(value), FIRST_READ)))
            self.source.fetch(chunk_path(key), [memoryview(piece)], len(value))
            value += piece
        self._refuse_other(digest_of([value]), chunk.digest, chunk)
        return value

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        """Reads like the contract, but fetches whole blocks, since only those can be checked."""
        chunk = self.manifest.by_key.get(key)
        if chunk is None:
            return False
        end = offset + total_bytes(parts)
        if end > chunk.size:
            raise CorruptChunk(f"Chunk {key} ended early.")
        if end == offset:
            return True
        first = offset // BLOCK_BYTES
        start, stop = first * BLOCK_BYTES, min(chunk.size, -(-end // BLOCK_BYTES) * BLOCK_BYTES)
        raw = memoryview(bytearray(stop - start))
        self.source.fetch(chunk_path(key), [raw], start)
        for got, expected in zip(block_digests(raw), chunk.blocks[first:], strict=False):
            self._refuse_other(got, expected, chunk)
        scatter(raw[offset - start :], parts, key)
        return True

    def identity(self) -> Hashable:
        return (type(self.source).__name__, str(self.source))

    def keys(self) -> Iterator[str]:
        return iter(self.manifest.by_key)

    def size(self, key: str) -> int | None:
        chunk = self.manifest.by_key.get(key)
        return None if chunk is None else chunk.size

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        raise self._read_only()

    def delete(self, key: str) -> bool:
        raise self._read_only()

    def check_writable(self) -> None:
        raise self._read_only()

    def mismatch_reason(self, namespace: str, metadata: Callable[[], Mapping[str, Any]]) -> str:
        if namespace == self.manifest.namespace:
            return ""
        ours = json.loads(canonical(metadata()))
        return f"the pack {self.source} {why_not(self.manifest.facts, self.manifest.salted, ours)}"

    def _refuse_other(self, got: str, expected: str, chunk: PackChunk) -> None:
        if got != expected:
            raise CorruptChunk(f"Chunk {chunk.key} of {self.source} is not the one that its manifest names.")

    def _read_only(self) -> StoreError:
        return StoreError(
            f"The pack {self.source} can only be read; pull it into a store of your own (cake-hf pull) to add to it."
        )


class FolderSource(PackSource):
    """The files of a pack in a folder on this machine."""

    range_seconds = 1e-4

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = expanded(folder).absolute()

    def __str__(self) -> str:
        return str(self.folder)

    def manifest(self, most: int) -> bytes:
        try:
            with open(self.folder / MANIFEST, "rb", opener=_open_plain_file) as file:
                return file.read(most + 1)
        except FileNotFoundError as error:
            raise StoreError(f"{self.folder} is no pack: it has no {MANIFEST}; check the path.") from error
        except OSError as error:
            raise StoreError(f"The pack {self.folder} cannot be read: {error.strerror}; check the path.") from error

    def fetch(self, path: str, parts: Sequence[memoryview], offset: int) -> None:
        try:
            with open(self.folder / path, "rb", buffering=0, opener=_open_plain_file) as file:
                file.seek(offset)
                for part in parts:
                    filled = 0
                    while filled < part.nbytes:
                        if not (count := file.readinto(part[filled:])):
                            raise CorruptChunk(f"The file {path} of the pack {self.folder} is cut short.")
                        filled += count
        except OSError as error:
            raise StoreError(f"{path} of the pack {self.folder} cannot be read: {error.strerror}.") from error


def open_folder_pack(folder: str | os.PathLike[str]) -> PackStore:
    """Opens a pack in a folder as a store.

    Raises:
        StoreError: the folder holds no pack, or one that cannot be read.
    """
    return PackStore(FolderSource(folder))


def digest_of(pieces: Iterable[Part]) -> str:
    """Returns the blake3 digest of the pieces in order, which also resists deliberate forgery.

    Raises:
        StoreError: the package blake3 is not installed.
    """
    digest = _blake3()()
    for piece in pieces:
        digest.update(piece)
    return str(digest.hexdigest())


def block_digests(raw: memoryview) -> tuple[str, ...]:
    """Returns the digest of each block of a file, or of a part of a file that starts at a block."""
    return tuple(digest_of([raw[start : start + BLOCK_BYTES]]) for start in range(0, len(raw), BLOCK_BYTES))


def _blake3() -> Callable[[], Any]:
    try:
        from blake3 import blake3
    except ImportError as error:
        raise StoreError('Packs need the package blake3: pip install "cake-hf[hub]".') from error
    return blake3


def _open_plain_file(path: str, flags: int) -> int:
    """Opens only regular files: a stranger's folder may hold a pipe, on which a plain open would block for ever, or a device.

    Links are followed, since the Hub client stores its downloads as links. Contents are checked against the manifest anyway.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise StoreError(f"{path} is not a plain file.")
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(f"{path} is not a plain file.")
    return descriptor
