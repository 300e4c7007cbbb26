"""Costs of computing and loading, remembered from prompt to prompt and from process to process.

There is one learner per (store, namespace, device). Within a process it lives as long as the store object; if a store has room
for notes on this machine, the learner is also kept in a small file there. Only speed depends on it: a file with any defect is
ignored and rewritten. Waits for it are short, because its directory may be on a mount that is gone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from cake_hf.limits import Limits
from cake_hf.report import Span
from cake_hf.scheduling.costs import Brought, Costs
from cake_hf.scheduling.learning import CostLearner
from cake_hf.scheduling.pace import Pace
from cake_hf.stores.background_queue import NOTES, QueueUser, Task, users_of
from cake_hf.stores.base import Store
from cake_hf.stores.safe_paths import directory, make_directory, opened, replace_file
from cake_hf.transfer.deadline import Late, ask
from cake_hf.util.forks import Lock
from cake_hf.util.processor import processor

logger = logging.getLogger("cake_hf")

MAX_FILE_BYTES = 2**20

QUEUE_BYTES = MAX_FILE_BYTES
"""Bytes of notes that may wait to be written in one directory; what is beyond that is not noted."""

NOTE_SECONDS = 5.0
"""Maximum seconds to wait for a note, when it is read and when the interpreter exits; without it, costs are learnt anew."""

_learners: weakref.WeakKeyDictionary[Store, dict[str, CostMemory]] = weakref.WeakKeyDictionary()
_notes: weakref.WeakValueDictionary[Path, Note] = weakref.WeakValueDictionary()
_lock = Lock()


class Note:
    """A small file with at most one hanging read, written in the background. Get it from `note_of`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._late = Late()
        self._newest = ""
        self.queue = note_queue(file.parent)

    def read(self, seconds: float = NOTE_SECONDS) -> str | None:
        """Returns the text written last, or about to be written; None if there is none or it does not arrive in time."""
        if not self.queue.is_idle():
            return self._newest
        answer = ask(self._load, seconds, "notes", self._late)
        if answer.error is not None:
            logger.debug("Costs are not recalled from %s: %s", self._file, answer.trouble)
        return answer.value

    def write(self, text: str) -> None:
        """Replaces the file soon, in the background. A newer text takes the place of one that is still waiting."""
        self._newest = text
        if not self.queue.offer(Task(self._file.name, len(text), partial(self._put, text)), supersede=True):
            logger.debug("Costs are not remembered in %s: the background queue refuses them.", self._file)

    def _put(self, text: str) -> None:
        """Writes the file. A task that waits keeps the note object alive, which therefore knows the newest text."""
        _write(self._file, text)

    def _load(self) -> str:
        """Reads the file. A hanging read keeps the note object alive, which therefore knows that the read hangs."""
        name, folder = self._file.name, self._file.parent
        with (
            directory(folder.parent) as root,
            directory(folder.name, root) as at,
            opened(name, os.O_RDONLY, at) as (file, _),
        ):
            return os.read(file, MAX_FILE_BYTES).decode()


class CostMemory:
    """A learner, its lock and its file. Get it from `recall_costs`.

    Args:
        file: the file of the note; None for no note.
        seconds: to wait for the note.
        may_write: returns whether the note may be written now.
    """

    def __init__(
        self, file: Path | None, seconds: float = NOTE_SECONDS, may_write: Callable[[], bool] = lambda: True
    ) -> None:
        self._note = None if file is None else note_of(file)
        self._may_write = may_write
        self._lock = Lock()
        text = None if self._note is None else self._note.read(seconds)
        self._learner = (None if text is None else CostLearner.from_json(text, time.time())) or CostLearner()

    def costs(self, chunk_bytes: int | None = None) -> Costs:
        """Returns the present estimate for raw chunks of that size, by default for chunks as last seen, encoded or not.

        A part is None until something was measured.
        """
        with self._lock:
            return self._learner.costs(chunk_bytes)

    def effort(self) -> dict[str, float]:
        """Returns `credit` and `quiet`, as a `Pace` takes them; see `CostLearner`."""
        with self._lock:
            return {"credit": self._learner.credit, "quiet": self._learner.quiet}

    def learn(
        self,
        pace: Pace,
        timeline: Sequence[Span],
        chunk_bytes: int,
        part: tuple[int, float] | None = None,
        brought: Mapping[int, Brought] | None = None,
    ) -> None:
        """Records what one restore measured.

        Args:
            timeline: the timeline of its report.
            chunk_bytes: bytes of one raw chunk.
            part: index on the absolute grid and seconds of the prompt's suffix, if it is a part of a chunk.
            brought: see `CostLearner.saw_restore`.
        """
        with self._lock:
            self._learner.saw_restore(pace, timeline, chunk_bytes, brought)
            if part is not None:
                self._learner.saw_part(*part)
            self._learner.costs()  # fit now, not while the next prompt waits for the result
            if self._note is not None and self._may_write():
                self._note.write(self._learner.to_json(time.time()))

    def let_exit_wait(self, seconds: float) -> None:
        """Makes the interpreter's exit wait at least `seconds` for the note to be written."""
        if self._note is not None:
            let_exit_wait(self._note.queue, seconds)

    def flush(self, seconds: float) -> bool:
        """Waits until what was learnt is written; False if it took longer."""
        return self._note is None or self._note.queue.flush(seconds)


def recall_costs(
    store: Store, namespace: str, device: str, limits: Limits | None = None, late: Late | None = None
) -> CostMemory:
    """Returns the memory for a store, a namespace and a device: the one of this process, from its file, or a new one.

    Args:
        store: where chunks are read from.
        namespace: digest.
        device: the device that computes, e.g. "cuda:0".
        limits: how long the file is waited for (`lookup_timeout`), also when the interpreter exits (`exit_flush_seconds`).
        late: questions to the store's place that were not answered in time; while there are any, nothing is asked.
    """
    limits = limits or Limits()
    machine = f"{sorted(processor().items())} {os.cpu_count()}"  # different machines may share a store
    name = hashlib.blake2b(f"{namespace} {device} {machine}".encode(), digest_size=8).hexdigest()
    with _lock:
        known = _learners.setdefault(store, {}).get(name)
    if known is not None:
        return known
    seconds = note_seconds(limits)
    file, may_write = ask(partial(_file_for, store, name), seconds, "notes", late).value or (None, _always)
    memory = CostMemory(file, seconds, may_write)
    memory.let_exit_wait(limits.exit_flush_seconds)
    with _lock:
        return _learners.setdefault(store, {}).setdefault(name, memory)


def note_seconds(limits: Limits) -> float:
    """Returns how long to wait for a note within these limits."""
    return min(NOTE_SECONDS, limits.lookup_timeout)


def _always() -> bool:
    return True


def permission(store: Store) -> Callable[[], bool]:
    """Returns a function that says whether notes may be written, by the store's last word.

    It holds no strong reference to the store: a learner that kept its store alive would never be freed.
    """
    alive, allowed = weakref.ref(store), store.leaves_traces()

    def may_write() -> bool:
        nonlocal allowed
        if (known := alive()) is not None:
            allowed = known.leaves_traces()
        return allowed

    return may_write


def _file_for(store: Store, name: str) -> tuple[Path, Callable[[], bool]] | None:
    """Returns where the note is and whether it may be written; None for no note. This asks the store, so it may hang."""
    folder = store.notes_folder()
    if not isinstance(folder, Path) or not folder.is_absolute():
        return None
    return folder / f"costs-{name}.json", permission(store)


def note_of(file: Path) -> Note:
    """Returns the one object of this process for a file; it lives as long as it is used, read or written."""
    with _lock:
        note = _notes.get(file)
        if note is None:
            note = _notes[file] = Note(file)
        return note


def note_queue(folder: Path) -> QueueUser:
    """Returns a new user of the background queue that writes to the notes in a folder."""
    return QueueUser(NOTES, lambda: folder, QUEUE_BYTES, exit_seconds=0.0)


def let_exit_wait(queue: QueueUser, seconds: float) -> None:
    """Makes the interpreter's exit wait for notes at least `seconds`, but not longer than `NOTE_SECONDS`."""
    queue.exit_seconds = max(queue.exit_seconds, min(seconds, NOTE_SECONDS))


def flush_costs(store: Store, seconds: float) -> bool:
    """Waits until what was learnt about a store is written, so that its directory may be removed; False if it took longer."""
    with _lock:
        known = list(_learners.get(store, {}).values())
    return _flush_all([one.flush for one in known], min(seconds, NOTE_SECONDS))


def flush_notes(seconds: float) -> bool:
    """Waits until all notes are written; False if it took longer."""
    return _flush_all([user.flush for user in users_of(NOTES)], seconds)


def _flush_all(flushes: Sequence[Callable[[float], bool]], seconds: float) -> bool:
    end = time.monotonic() + seconds
    return all(flush(max(0.0, end - time.monotonic())) for flush in flushes)


def _write(file: Path, text: str) -> None:
    """Replaces the file as a whole. If that is not possible (in a read-only store), nothing is remembered."""
    try:
        with directory(file.parent.parent) as root:
            make_directory(file.parent.name, root)
            with directory(file.parent.name, root) as folder:
                replace_file(file.name, text.encode(), folder)
    except Exception as error:
        logger.debug("Costs are not remembered in %s: %s", file, error)
