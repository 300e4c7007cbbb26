"""The trials: a fault each, and what the system's user then gets.

All of them ask about a document of which the store has the KV, and compare with the system's own run without a cache, greedy,
in the same dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.shootout import faults
from benchmarks.shootout.bench import BASE, Bench, Failed, Model
from benchmarks.shootout.child import NotStarted
from benchmarks.shootout.disks import NoDisk, full_disk, hanging_disk
from benchmarks.shootout.judge import Cell, Outcome, Seen, judge, not_applicable
from benchmarks.shootout.questions import MEMORY
from benchmarks.shootout.variants import OTHER, REVISION

KILLED_AT = (0.1, 0.5, 0.9)
"""Parts of the store's size at which the process that saves is killed."""

POLL_SECONDS = 0.001

ROOM = 4
"""A full disk has room for one part in so many."""

A, B = "tenant-a", "tenant-b"


def again(bench: Bench) -> Cell:
    """The same process is asked a second question: no fault at all."""
    replies = bench.ask(bench.new_folder("none"), bench.first, role=MEMORY)
    return judge(bench.seen("one process", bench.first, replies))


def restart(bench: Bench) -> Cell:
    """Another process is asked."""
    store = bench.filled()
    size = faults.used(store)
    return judge(
        bench.seen("a new process", bench.first, bench.ask(store, bench.first)), f"{size / 1e6:.0f} MB on disk"
    )


def flipped(bench: Bench) -> Cell:
    """A byte of each file is flipped."""
    return _damaged(bench, faults.flip)


def truncated(bench: Bench) -> Cell:
    """Each file is cut in half."""
    return _damaged(bench, faults.truncate)


def deleted(bench: Bench) -> Cell:
    """A file is deleted."""
    return _damaged(bench, faults.delete)


def _damaged(bench: Bench, damage: Callable[[Path], str]) -> Cell:
    store = bench.filled()
    if not faults.files(store):
        return not_applicable("There is no file.")
    note = damage(store)
    return judge(bench.seen("a new process", bench.first, bench.ask(store, bench.first)), note)


def other_model(bench: Bench) -> Cell:
    """A model with the same shape and other weights uses the store."""
    return _with(bench, BASE, Model(OTHER))


def revision(bench: Bench) -> Cell:
    """The same model with slightly changed weights, as after a fine-tuning, uses the store."""
    return _with(bench, BASE, Model(REVISION))


def adapter(bench: Bench) -> Cell:
    """The store was filled without a LoRA adapter and is used with it, and the other way round."""
    if not bench.spec.adapters:
        return not_applicable("No adapter for this form of the weights.")
    on, off = Model(adapter=True), BASE
    seen = [*_used(bench, off, on, "with the adapter"), *_used(bench, on, off, "without the adapter")]
    return judge(seen)


def dtype(bench: Bench) -> Cell:
    """The store was filled in one dtype and is used in another."""
    first, second = bench.spec.dtypes
    return _with(bench, BASE, Model(dtype=second), f"{first}, then {second}")


def _with(bench: Bench, filler: Model, user: Model, note: str = "") -> Cell:
    return judge(_used(bench, filler, user, "a new process"), note)


def _used(bench: Bench, filler: Model, user: Model, what: str) -> list[Seen]:
    return bench.seen(what, bench.first, bench.ask(bench.filled(filler), bench.first, user), user)


def tenants(bench: Bench) -> Cell:
    """One tenant's KV is in the store, and another one asks about the same document."""
    if not bench.spec.tenants:
        return not_applicable("It has no notion of tenants.")
    replies = bench.ask(bench.filled(tenant=A), bench.first[:1], tenant=B)
    cell = judge(bench.seen("the other tenant", bench.first[:1], replies))
    return judge(bench.seen("the other tenant", bench.first[:1], replies), CROSSED if cell.loaded else "")


CROSSED = "served from the other tenant's KV"


def full(bench: Bench) -> Cell:
    """The disk has room for a quarter of the KV: a process saves, and another one is asked."""
    room = faults.used(bench.filled()) // ROOM
    if not room:
        return not_applicable("It writes nothing to the disk.")
    with full_disk(bench.new_folder("full"), room) as mounted:
        saving = bench.ask(mounted, bench.first[:1])
        after = bench.ask(mounted, bench.first)
    seen = [*bench.seen("the one that saves", bench.first, saving), *bench.seen("a new process", bench.first, after)]
    return judge(seen, f"a file system of {room / 1e6:.1f} MB")


def hanging(bench: Bench) -> Cell:
    """The disk lists its files, and reads never come back."""
    store = bench.filled()
    with ExitStack() as after, hanging_disk(bench.disk, store, bench.new_folder("hanging")) as mounted:
        child = after.enter_context(bench.start(mounted))  # it waits for the disk, so it ends after that has gone
        begin = time.monotonic()
        reply = child.ask(bench.first[0], bench.patience)
        took = time.monotonic() - begin
    seen = bench.seen("a new process", bench.first, [reply])
    return judge(seen, f"a FUSE file system; {took:.1f} s")


def two_writers(bench: Bench) -> Cell:
    """Two processes save a document each at the same time, and a third one is asked about both."""
    store = bench.new_folder("store")
    store.mkdir()
    questions = [bench.documents[0][0], bench.documents[1][0]]
    with bench.start(store) as one, bench.start(store) as other:
        for child, question in zip((one, other), questions, strict=True):
            child.send(question)
        saving = [child.receive(bench.patience) for child in (one, other)]
        for child in (one, other):
            child.close(bench.patience)
    after = bench.ask(store, questions)
    return judge([*bench.seen("the two", questions, saving), *bench.seen("a new process", questions, after)])


def killed(bench: Bench) -> Cell:
    """A process is killed while it saves, at three moments, and another one is asked."""
    whole, seen, places = faults.used(bench.filled()), [], []
    if not whole:
        return not_applicable("It writes nothing to the disk.")
    for part in KILLED_AT:
        store = bench.new_folder("store")
        store.mkdir()
        with bench.start(store) as child:
            child.send(bench.first[0])
            end = time.monotonic() + bench.patience
            while faults.used(store) < part * whole and time.monotonic() < end:
                if not child.waits:
                    break
                time.sleep(POLL_SECONDS)
        places.append(f"{faults.used(store) / whole:.0%}")
        seen += bench.seen(f"after kill -9 at {places[-1]}", bench.first[:1], bench.ask(store, bench.first[:1]))
    return judge(seen, f"killed with {', '.join(places)} of the store written")


TRIALS: dict[str, tuple[str, Callable[[Bench], Cell]]] = {
    "again": ("asked again, no fault", again),
    "restart": ("restart", restart),
    "flipped": ("a flipped byte", flipped),
    "truncated": ("truncated files", truncated),
    "deleted": ("a deleted file", deleted),
    "other-model": ("another model, same shape", other_model),
    "revision": ("another revision", revision),
    "adapter": ("LoRA on / off", adapter),
    "dtype": ("another dtype", dtype),
    "tenants": ("another tenant", tenants),
    "full": ("a full disk", full),
    "hanging": ("a disk that hangs", hanging),
    "writers": ("two writers", two_writers),
    "killed": ("kill -9 while saving", killed),
}
"""Name on the command line -> (name for people, the trial)."""


def run(bench: Bench, trial: str) -> Cell:
    """Runs a trial; what cannot be tried here does not apply, and what fails before the trial's fault is an error."""
    try:
        return TRIALS[trial][1](bench)
    except Failed as error:
        return Cell(Outcome.ERROR, [f"the one that saves: {error}"])
    except (NoDisk, NotStarted) as error:
        return not_applicable(str(error))
