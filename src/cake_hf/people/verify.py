"""`cake-hf verify`: read every chunk of a store and check it against its own checksum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cake_hf.arithmetic.errors import CorruptChunk, StoreError
from cake_hf.arithmetic.outside import shown
from cake_hf.people.inspect_store import StoredChunk, chunk_of, read_chunk
from cake_hf.stores import Store
from cake_hf.tensors.codec import Checksum, check_file, offsets_of, payload_size

WHOLE_BYTES = 2**28
"""Larger chunks are read in steps."""

STEP_BYTES = 2**25


@dataclass(frozen=True)
class BadChunk:
    """A chunk that is not what its key says, or that cannot be read.

    Attributes:
        key: its name.
        why: a sentence.
        corrupt: it was read and is wrong; False where the read itself failed, which may be the disk's or a mode's fault.
    """

    key: str
    why: str
    corrupt: bool


@dataclass(frozen=True)
class Verified:
    """What came of it.

    Attributes:
        checked: chunks that were read, damaged ones included.
        nbytes: of those that are well.
        bad: the damaged ones.
    """

    checked: int
    nbytes: int
    bad: list[BadChunk]


def verify(store: Store, progress: Callable[[int, int], None]) -> Verified:
    """Check all chunks; those that are deleted meanwhile are left out.

    Args:
        store: any.
        progress: called with (chunks that were checked, all chunks).
    """
    checked, nbytes, bad, keys = 0, 0, [], list(store.keys())
    for count, key in enumerate(keys, start=1):
        try:
            size = _checked(store, key)
            if size is not None:
                checked += 1
                nbytes += size
        except StoreError as error:
            corrupt = isinstance(error, CorruptChunk)
            checked += corrupt
            bad.append(BadChunk(key, shown(error), corrupt))
        except MemoryError:
            bad.append(BadChunk(key, f"Chunk {key} is larger than the memory.", corrupt=False))
        progress(count, len(keys))
    return Verified(checked, nbytes, bad)


def _checked(store: Store, key: str) -> int | None:
    """Bytes of a chunk that is well; None if it is gone.

    Raises:
        CorruptChunk: it is not well.
        StoreError: it cannot be read.
    """
    size = store.size(key)
    if size is not None and size > WHOLE_BYTES:
        # The header first: what it says must fit to the value's size before memory is taken for that. A file may have holes.
        chunk = read_chunk(store, key)
        if chunk is None or store.reads_ranges:
            return None if chunk is None else _checked_in_steps(store, key, chunk)
    raw = None if size is None else store.read(key)
    if raw is not None:
        chunk_of(raw, key, len(raw))
        check_file(raw, key)
    return None if raw is None else len(raw)


def _checked_in_steps(store: Store, key: str, chunk: StoredChunk) -> int | None:
    spans = sorted(offsets_of(entry) for entry in chunk.table.values())
    if len(spans) != len(chunk.facts.checksums):
        raise CorruptChunk(f"Chunk {key} has {len(spans)} tensors and {len(chunk.facts.checksums)} checksums.")
    payload, step = chunk.file_bytes - payload_size(chunk.table), memoryview(bytearray(STEP_BYTES))
    for (start, end), expected in zip(spans, chunk.facts.checksums, strict=True):
        digest = Checksum()
        for offset in range(start, end, STEP_BYTES):
            part = step[: min(STEP_BYTES, end - offset)]
            if not store.read_range(key, [part], payload + offset):
                return None
            digest.update(part)
        if digest.hexdigest() != expected:
            raise CorruptChunk(f"Chunk {key} does not match its checksum.")
    return chunk.file_bytes


def delete(store: Store, bad: Sequence[BadChunk]) -> int:
    """Remove corrupt chunks, which will be computed and saved again when their prompt comes; returns how many.

    A chunk that could not be read at all may be well: it stays.

    Raises:
        StoreError: one of them cannot be removed.
    """
    return sum(store.delete(chunk.key) for chunk in bad if chunk.corrupt)
