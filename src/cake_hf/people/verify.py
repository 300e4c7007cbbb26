"""`cake-hf verify`: read every chunk of a store and check it against its own checksum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cake_hf.arithmetic.errors import CorruptChunk, StoreError
from cake_hf.arithmetic.outside import shown
from cake_hf.people.inspect_store import read_chunk
from cake_hf.stores import Store
from cake_hf.tensors.codec import check_file


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
            # The header first: what it says must fit to the value's size before memory is taken for that.
            raw = None if read_chunk(store, key) is None else store.read(key)
            if raw is not None:
                check_file(raw, key)
                checked += 1
                nbytes += len(raw)
        except StoreError as error:
            corrupt = isinstance(error, CorruptChunk)
            checked += corrupt
            bad.append(BadChunk(key, shown(error), corrupt))
        except MemoryError:
            bad.append(BadChunk(key, f"Chunk {key} is larger than the memory.", corrupt=False))
        progress(count, len(keys))
    return Verified(checked, nbytes, bad)


def delete(store: Store, bad: Sequence[BadChunk]) -> int:
    """Remove corrupt chunks, which will be computed and saved again when their prompt comes; returns how many.

    A chunk that could not be read at all may be well: it stays.

    Raises:
        StoreError: one of them cannot be removed.
    """
    return sum(store.delete(chunk.key) for chunk in bad if chunk.corrupt)
