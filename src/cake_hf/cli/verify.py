"""`cake-hf verify`: reads every chunk of a store, checks it against its own checksum, and shows what it has found."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial

from rich.table import Table
from rich.text import Text

from cake_hf.chunks.codec import Checksum, check_pieces, spans_of
from cake_hf.chunks.encoded_checks import check_encoded_file, stored_pieces
from cake_hf.chunks.encoded_header import is_encoded, parse_encoded_header
from cake_hf.cli.console import console
from cake_hf.cli.inspect_store import Progress, StoredChunk, chunk_of, read_chunk
from cake_hf.cli.many import each_answer
from cake_hf.errors import CorruptChunk, NewerChunk, StoreError
from cake_hf.stores import Store
from cake_hf.util.redaction import shown
from cake_hf.util.sizes import bytes_text, count_text

THREADS = 4
"""Each thread takes memory for what it reads."""

WHOLE_BYTES = 2**26
"""Larger chunks are read in steps."""

STEP_BYTES = 2**25


@dataclass(frozen=True)
class BadChunk:
    """A chunk that is not what its key says, or that cannot be read.

    Attributes:
        key: its name.
        why: the fault, in a sentence.
        corrupt: it was read and is wrong; False if the read failed, which may be the fault of the disk or of permissions.
    """

    key: str
    why: str
    corrupt: bool


@dataclass(frozen=True)
class Verified:
    """The result of a check.

    Attributes:
        checked: chunks that were read, damaged ones included.
        nbytes: of the good chunks.
        bad: the damaged ones.
        left: how many were not checked.
        stopped: the user ended the check early.
    """

    checked: int
    nbytes: int
    bad: list[BadChunk]
    left: int = 0
    stopped: bool = False


def verify(store: Store, progress: Progress, *, deep: bool = False) -> Verified:
    """Checks all chunks, except those that are deleted meanwhile. Ctrl-C ends it early, with the findings so far.

    It only reads: it takes no lock, so no other user of the store waits for it.

    Args:
        store: any.
        progress: called with (chunks checked, all chunks).
        deep: also decode encoded chunks, and compare what comes out with the checksums of what was encoded.
    """
    checked, nbytes, bad, keys = 0, 0, [], list(store.keys())
    left, stopped = len(keys), True
    with suppress(KeyboardInterrupt), closing(each_answer(keys, partial(_verdict, store, deep), THREADS)) as verdicts:
        for _, verdict in verdicts:
            left -= 1
            if isinstance(verdict, BadChunk):
                checked += verdict.corrupt
                bad.append(verdict)
            elif verdict is not None:
                checked += 1
                nbytes += verdict
            progress(len(keys) - left, len(keys))
        stopped = False
    return Verified(checked, nbytes, bad, left, stopped)


def _verdict(store: Store, deep: bool, key: str) -> int | BadChunk | None:
    """Returns the bytes of a good chunk, or what is wrong with it; None if it is gone."""
    try:
        return _checked(store, deep, key)
    except StoreError as error:
        return BadChunk(key, shown(error), isinstance(error, CorruptChunk) and not isinstance(error, NewerChunk))
    except MemoryError:
        return BadChunk(key, f"Chunk {key} does not fit in memory.", corrupt=False)


def _checked(store: Store, deep: bool, key: str) -> int | None:
    """Returns the bytes of a good chunk; None if it is gone.

    Raises:
        CorruptChunk: it is damaged.
        StoreError: it cannot be read.
    """
    size = store.size(key)
    if size is not None and size > WHOLE_BYTES:
        # The header first: the size it states must match the value's size before memory is taken for it. A file may have holes.
        chunk = read_chunk(store, key)
        if chunk is None or (store.reads_ranges and not (deep and chunk.codec != "none")):
            return None if chunk is None else _checked_in_steps(store, key, chunk)
    raw = None if size is None else store.read(key)
    if raw is None:
        return None
    chunk = chunk_of(raw, key, len(raw))
    if is_encoded(raw):
        check_encoded_file(raw, key, deep=deep)
        return len(raw)
    payload = memoryview(raw)[len(raw) - chunk.table.payload_bytes :]
    check_pieces([payload[start:end] for start, end in spans_of(chunk.metadata, chunk.table)], chunk.metadata)
    return len(raw)


def _checked_in_steps(store: Store, key: str, chunk: StoredChunk) -> int | None:
    step, at = memoryview(bytearray(STEP_BYTES)), chunk.file_bytes - chunk.payload_bytes
    for nbytes, expected in _stored_pieces(store, key, chunk):
        digest, end = Checksum(), at + nbytes
        while at < end:
            part = step[: min(STEP_BYTES, end - at)]
            if not store.read_range(key, [part], at):
                return None
            digest.update(part)
            at += part.nbytes
        if not digest.hexdigest().startswith(expected):
            raise CorruptChunk(f"Chunk {key} does not match its checksum.")
    return chunk.file_bytes


def _stored_pieces(store: Store, key: str, chunk: StoredChunk) -> list[tuple[int, str]]:
    """Returns the bytes and the checksum, or its first digits, of each piece of the payload, in order."""
    if chunk.codec == "none":
        spans = spans_of(chunk.metadata, chunk.table)
        return [(end - start, digits) for (start, end), digits in zip(spans, chunk.metadata.checksums, strict=True)]
    header = store.head(key, chunk.file_bytes - chunk.payload_bytes)
    return [] if header is None else stored_pieces(parse_encoded_header(header)[0])


def delete(store: Store, bad: Sequence[BadChunk]) -> int:
    """Deletes corrupt chunks, which will be computed and saved again when their prompt comes; returns how many.

    A chunk that could not be read at all may be good, and stays.

    Raises:
        StoreError: one of them cannot be deleted.
    """
    return sum(store.delete(chunk.key) for chunk in bad if chunk.corrupt)


def show_verified(result: Verified, bad: Sequence[BadChunk], deleted: int) -> None:
    """Shows the damaged chunks, if any, and what to do about them."""
    what = _what_was_checked(result)
    if not bad:
        console.print(Text.assemble(("All is well:", "green"), f" {what} checked."))
        return
    _show_bad(bad)
    console.print(f"\n{len(bad)} damaged of {what} checked.", style="bold red")
    if deleted:
        console.print(f"{count_text(deleted, 'chunk')} deleted; computed and saved again when their prompt comes.")
    elif any(chunk.corrupt for chunk in bad):
        console.print(Text.assemble("Delete them with the same command and ", ("--fix", "bold"), "."))


def show_stopped(result: Verified) -> None:
    """Shows the findings of a check that was stopped."""
    if result.bad:
        _show_bad(result.bad)
    found = f"{len(result.bad)} damaged of {_what_was_checked(result)} checked"
    console.print(f"\nStopped: {found}, {count_text(result.left, 'chunk')} not checked, nothing deleted.", style="bold")


def _what_was_checked(result: Verified) -> str:
    return f"{count_text(result.checked, 'chunk')}, {bytes_text(result.nbytes)}"


def _show_bad(bad: Sequence[BadChunk]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("damaged chunk", style="red", no_wrap=True)
    table.add_column("why")
    for chunk in bad:
        table.add_row(chunk.key, Text(chunk.why))
    console.print(table)
