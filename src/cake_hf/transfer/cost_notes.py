"""What computing and loading cost here, remembered from prompt to prompt and from process to process.

One learner per (store, namespace, device). Within a process it lives as long as the store object; a store that has room for
notes on this machine also keeps it in a small file there. Nothing depends on it but speed: whatever is wrong with the file,
it is ignored and written anew. Nobody waits long for it: its directory may be on a mount that is gone.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cake_hf.limits import Limits
from cake_hf.report import Span
from cake_hf.scheduling.costs import Costs
from cake_hf.scheduling.learning import CostLearner
from cake_hf.scheduling.pace import Pace
from cake_hf.stores.background_queue import leaving_since
from cake_hf.stores.base import Store
from cake_hf.stores.safe_paths import directory, make_directory, opened, replace_file
from cake_hf.transfer.deadline import Late, ask, in_words
from cake_hf.util.forks import Lock, renewed_in_child
from cake_hf.util.processor import processor
from cake_hf.util.threads import refusal

logger = logging.getLogger("cake_hf")

MAX_FILE_BYTES = 2**20

NOTE_SECONDS = 5.0
"""How long a note is waited for at most, when it is read and at the interpreter's end; without it costs are learnt anew."""

_learners: weakref.WeakKeyDictionary[Store, dict[str, CostMemory]] = weakref.WeakKeyDictionary()
_notes: weakref.WeakValueDictionary[Path, Note] = weakref.WeakValueDictionary()
_lock = Lock()


class Note:
    """A small file, of which at most one read and one write hang. Get it from `note_of`.

    It is written in the background: what comes later replaces what waits.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._late = Late()
        self.exit_seconds = 0.0
        self._begin_anew()
        renewed_in_child(self._begin_anew)

    def _begin_anew(self) -> None:
        """In a child, too: what the parent is about to write is the parent's to write."""
        self._changed = threading.Condition()
        self._waiting: str | None = None
        self._written: str | None = None  # just now
        self._busy = False

    def read(self, seconds: float = NOTE_SECONDS) -> str | None:
        """What was written last, or is about to be; None if there is nothing, or it does not come in time."""
        with self._changed:
            text = self._waiting if self._waiting is not None else self._written
        if text is not None:
            return text
        answer = ask(self._load, seconds, "notes", self._late)
        if answer.error is not None:
            logger.debug("Costs are not recalled from %s: %s", self._file, answer.trouble)
        return answer.value

    def write(self, text: str) -> None:
        """Replace the file, soon."""
        with self._changed:
            self._waiting = self._join(self._waiting, text)
            if self._busy:
                return
            self._busy = True
        error = refusal(threading.Thread(target=self._run, name="cake-notes", daemon=True))
        if error is not None:
            logger.debug("Costs are not remembered in %s: %s", self._file, error)
            with self._changed:
                self._busy = False

    def flush(self, seconds: float) -> bool:
        """Wait until nothing waits to be written; False if it took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, seconds)

    def _load(self) -> str:
        """Where this hangs it keeps the note alive, which knows that."""
        name, folder = self._file.name, self._file.parent
        with (
            directory(folder.parent) as root,
            directory(folder.name, root) as at,
            opened(name, os.O_RDONLY, at) as (file, _),
        ):
            return os.read(file, MAX_FILE_BYTES).decode()

    def _run(self) -> None:
        while (text := self._take()) is not None:
            try:
                self._put(text)
            except BaseException as error:  # nobody is to wait for this thread for ever
                logger.debug("Costs are not remembered in %s: %s", self._file, in_words(error))

    def _join(self, waiting: str | None, text: str) -> str:
        """What is to be written where something waits to be: here only what came last."""
        return text

    def _put(self, text: str) -> None:
        _write(self._file, text)

    def _take(self) -> str | None:
        with self._changed:
            self._written, self._waiting = self._waiting, None
            self._busy = self._written is not None
            self._changed.notify_all()
            return self._written


class CostMemory:
    """A learner, its lock and its file. Get it from `recall_costs`.

    Args:
        file: of the note; None for no note.
        seconds: to wait for it.
        may_write: whether the note may be written now.
    """

    def __init__(
        self, file: Path | None, seconds: float = NOTE_SECONDS, may_write: Callable[[], bool] = lambda: True
    ) -> None:
        self._note = None if file is None else note_of(file)
        self._may_write = may_write
        self._lock = Lock()
        text = None if self._note is None else self._note.read(seconds)
        self._learner = (None if text is None else CostLearner.from_json(text, time.time())) or CostLearner()

    def costs(self, chunk_bytes: int) -> Costs:
        """The present estimate for chunks of that size; its halves are None until something was measured."""
        with self._lock:
            return self._learner.costs(chunk_bytes)

    @property
    def credit(self) -> float:
        """See `CostLearner`."""
        with self._lock:
            return self._learner.credit

    @property
    def quiet(self) -> float:
        """See `CostLearner`."""
        with self._lock:
            return self._learner.quiet

    def learn(
        self, pace: Pace, timeline: Sequence[Span], chunk_bytes: int, part: tuple[int, float] | None = None
    ) -> None:
        """Take in what one restore measured.

        Args:
            pace: of the restore.
            timeline: of its report.
            chunk_bytes: of one chunk.
            part: index on the absolute grid, and seconds, of the prompt's last piece, if it is a part of a chunk.
        """
        with self._lock:
            self._learner.saw_restore(pace, timeline, chunk_bytes)
            if part is not None:
                self._learner.saw_part(*part)
            self._learner.costs(chunk_bytes)  # the fit is made now, not while the next prompt waits for it
            if self._note is not None and self._may_write():
                self._note.write(self._learner.to_json(time.time()))

    def let_exit_wait(self, seconds: float) -> None:
        """Leaving the interpreter waits at least that long for the note to be written."""
        if self._note is not None:
            self._note.exit_seconds = max(self._note.exit_seconds, seconds)

    def flush(self, seconds: float) -> bool:
        """Wait until what was learnt is written; False if it took longer."""
        return self._note is None or self._note.flush(seconds)


def recall_costs(
    store: Store, namespace: str, device: str, limits: Limits | None = None, late: Late | None = None
) -> CostMemory:
    """The memory for a store, a namespace and a device, from this process, from its file, or new.

    Args:
        store: where chunks are read from.
        namespace: digest.
        device: that computes, e.g. "cuda:0".
        limits: how long its file is waited for (`lookup_timeout`), also when the interpreter ends (`exit_flush_seconds`).
        late: questions to the place of the store that were not answered in time; while there are any, nothing is asked.
    """
    limits = limits or Limits()
    machine = f"{sorted(processor().items())} {os.cpu_count()}"  # a store may be shared with unlike ones
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
    """How long a note is waited for within some limits."""
    return min(NOTE_SECONDS, limits.lookup_timeout)


def _always() -> bool:
    return True


def permission(store: Store) -> Callable[[], bool]:
    """Whether notes may be written, as the store said last. (A learner that kept its store alive would never go.)"""
    alive, allowed = weakref.ref(store), store.leaves_traces()

    def may_write() -> bool:
        nonlocal allowed
        if (known := alive()) is not None:
            allowed = known.leaves_traces()
        return allowed

    return may_write


def _file_for(store: Store, name: str) -> tuple[Path, Callable[[], bool]] | None:
    """Where the note is, and whether it may be written; None for no note. The store is asked, so this may hang."""
    folder = store.notes_folder()
    if not isinstance(folder, Path) or not folder.is_absolute():
        return None
    return folder / f"costs-{name}.json", permission(store)


def note_of(file: Path, kind: type[Note] = Note) -> Note:
    """The one object of this process for a file, as long as somebody uses it, or it is being read or written.

    Args:
        file: of the note.
        kind: of the object, where it has to be made.
    """
    with _lock:
        note = _notes.get(file)
        if note is None:
            note = _notes[file] = kind(file)
        return note


def flush_costs(store: Store, seconds: float) -> bool:
    """Wait until what was learnt about a store is written, so that its directory may be removed; False if it took longer."""
    with _lock:
        known = list(_learners.get(store, {}).values())
    return _flush_all(known, min(seconds, NOTE_SECONDS))


def flush_notes(seconds: float) -> bool:
    """Wait until all notes are written; False if it took longer."""
    with _lock:
        notes = list(_notes.values())
    return _flush_all(notes, seconds)


@atexit.register
def _leave() -> None:
    """A daemon thread that is in the middle of a write would leave half a file behind."""
    seconds = min(NOTE_SECONDS, max((note.exit_seconds for note in list(_notes.values())), default=0.0))
    flush_notes(leaving_since() + seconds - time.monotonic())


def _flush_all(what: Sequence[CostMemory | Note], seconds: float) -> bool:
    end = time.monotonic() + seconds
    return all(one.flush(max(0.0, end - time.monotonic())) for one in what)


def _write(file: Path, text: str) -> None:
    """Replace the file as a whole. Where that is not possible (a read-only store), nothing is remembered."""
    try:
        with directory(file.parent.parent) as root:
            make_directory(file.parent.name, root)
            with directory(file.parent.name, root) as folder:
                replace_file(file.name, text.encode(), folder)
    except OSError as error:
        logger.debug("Costs are not remembered in %s: %s", file, error)
