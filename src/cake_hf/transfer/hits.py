"""Counts how much computing a store has saved its prompts, day by day: lines in a small file among the store's notes.

Each prompt appends one line, in the background. When the file has become large, the lines of each day are added up and days
beyond the retention period are dropped. Counts that two processes write at the very moment of that may get lost; nothing
depends on them.
"""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from cake_hf.limits import Limits
from cake_hf.report import Report
from cake_hf.stores.background_queue import QueueUser, Task
from cake_hf.stores.base import Store
from cake_hf.stores.safe_paths import directory, make_directory, open_file, opened, replace_file
from cake_hf.transfer.cost_notes import NOTE_SECONDS, let_exit_wait, note_queue, permission
from cake_hf.transfer.deadline import Late, ask
from cake_hf.util.forks import Lock

logger = logging.getLogger("cake_hf")

FILE = "hits.log"
MAX_FILE_BYTES = 2**18
DAYS_KEPT = 400

_LINE = re.compile(r"(\d{4}-\d\d-\d\d)((?: \d{1,18}){6})")


@dataclass(frozen=True)
class Hits:
    """Totals over prompts.

    Attributes:
        prompts: number of prompts that were restored, or computed and saved, in chunks.
        with_hits: those of them for which something was loaded.
        tokens: tokens of these prompts.
        tokens_loaded: those tokens that came from the store.
        chunks_loaded, bytes_loaded: the same in chunks and in bytes.
    """

    prompts: int = 0
    with_hits: int = 0
    tokens: int = 0
    tokens_loaded: int = 0
    chunks_loaded: int = 0
    bytes_loaded: int = 0

    @classmethod
    def of(cls, report: Report) -> Hits:
        """Returns the totals of one prompt, or of the prompts of a batch."""
        loaded = report.chunks_loaded
        hits = min(report.batch, loaded + report.tails_loaded)
        tokens = min(report.tokens, loaded * report.chunk_size + report.tail_tokens_loaded)
        return cls(report.batch, hits, report.tokens, tokens, loaded, report.bytes_loaded)

    def __add__(self, other: Hits) -> Hits:
        return Hits(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


def parsed(text: str) -> dict[str, Hits]:
    """Returns day -> totals of the day's prompts, by date, from the file's text. Invalid lines are skipped."""
    found: dict[str, Hits] = {}
    for line in text.splitlines():
        if match := _LINE.fullmatch(line):
            found[match[1]] = found.get(match[1], Hits()) + Hits(*map(int, match[2].split()))
    return dict(sorted(found.items()))


def read_hits(folder: Path) -> dict[str, Hits]:
    """Returns the totals in a store's notes; empty if there are none.

    Raises:
        OSError: the notes cannot be read.
    """
    try:
        return parsed(_text(folder / FILE))
    except FileNotFoundError:
        return {}


@dataclass(frozen=True)
class _Place:
    """Where a store's hits are counted, and whether they may be counted now."""

    file: Path
    queue: QueueUser
    may_write: Callable[[], bool]


_places: weakref.WeakKeyDictionary[Store, _Place | None] = weakref.WeakKeyDictionary()
_lock = Lock()


def count_hits(store: Store, report: Report, limits: Limits, late: Late | None = None) -> None:
    """Counts a finished prompt beside its store, soon, if the store has room for notes on this machine.

    Args:
        store: the store of the prompt's cache.
        limits: how long the store may take to say where its notes are (`lookup_timeout`).
        late: questions to the store's place that were not answered in time; while there are any, nothing is asked.
    """
    with _lock:
        known, place = store in _places, _places.get(store)
    if not known:
        place = ask(partial(_place_of, store), min(NOTE_SECONDS, limits.lookup_timeout), "notes", late).value
        with _lock:
            place = _places.setdefault(store, place)
    if place is not None and place.may_write():
        let_exit_wait(place.queue, limits.exit_flush_seconds)
        line = _line(datetime.now(UTC).date().isoformat(), Hits.of(report))
        if not place.queue.offer(Task(FILE, len(line), partial(_append, place.file, line))):
            logger.debug("Hits are not counted in %s: the background queue refuses them.", place.file)


def flush_hits(store: Store, seconds: float) -> bool:
    """Waits until what was counted beside a store is written; False if it took longer."""
    with _lock:
        place = _places.get(store)
    return place is None or place.queue.flush(max(0.0, min(seconds, NOTE_SECONDS)))


def _place_of(store: Store) -> _Place | None:
    folder = store.notes_folder() if store.counts_hits else None
    if not isinstance(folder, Path) or not folder.is_absolute():
        return None
    return _Place(folder / FILE, note_queue(folder), permission(store))


def _line(day: str, hits: Hits) -> str:
    return f"{day} {' '.join(map(str, astuple(hits)))}\n"


def _append(file: Path, line: str) -> None:
    """Adds a line to the file. If that is not possible (in a read-only store), the prompt is not counted."""
    try:
        with directory(file.parent.parent) as root:
            make_directory(file.parent.name, root)
            with directory(file.parent.name, root) as folder:
                _append_in(folder, file, line)
    except Exception as error:
        logger.debug("Hits are not counted in %s: %s", file, error)


def _append_in(folder: int, file: Path, line: str) -> None:
    descriptor, status = open_file(file.name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, folder)
    try:
        if status.st_size + len(line) <= MAX_FILE_BYTES:
            os.write(descriptor, line.encode())
            return
    finally:
        os.close(descriptor)
    kept = list(parsed(_text(file) + line).items())[-DAYS_KEPT:]
    replace_file(file.name, "".join(_line(day, hits) for day, hits in kept).encode(), folder)


def _text(file: Path) -> str:
    with (
        directory(file.parent.parent) as root,
        directory(file.parent.name, root) as folder,
        opened(file.name, os.O_RDONLY, folder) as (descriptor, _),
    ):
        return os.pread(descriptor, 2 * MAX_FILE_BYTES, 0).decode(errors="replace")
