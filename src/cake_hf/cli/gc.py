"""`cake-hf gc`: deletes chunks that were not used for long, and chunks over a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cake_hf.cli.console import WRONG, console, progress_bar
from cake_hf.cli.inspect_store import existing_store
from cake_hf.cli.many import each_answer
from cake_hf.cli.options import StoreArgument
from cake_hf.errors import StoreError
from cake_hf.stores import LocalStore
from cake_hf.stores.eviction import FRONT_FIRST, LRU, ChunkPosition, Entry, Order, order_named
from cake_hf.util.redaction import shown, shown_url
from cake_hf.util.sizes import bytes_text, count_text, parse_bytes, parse_seconds

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Selection:
    """The chunks that stay and those that go.

    Attributes:
        all: the store's chunks.
        old: those of them that have not been used for too long.
        over: those of the others that must go to meet the budget, in the order of deletion.
        pinned: chunks that stay, however old.
    """

    all: list[Entry]
    old: list[Entry]
    over: list[Entry]
    pinned: list[Entry] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Bytes that stay."""
        return total_bytes(self.all) - total_bytes(self.old) - total_bytes(self.over)


@dataclass(frozen=True)
class Collected:
    """The result of a collection.

    Attributes:
        gone: the deleted chunks.
        in_use: how many chunks stay because they were used after they had been selected.
        failed: key -> why it could not be deleted.
        swept: files of killed writers that were removed.
    """

    gone: list[Entry]
    in_use: int
    failed: dict[str, str]
    swept: int


def gc_command(
    store: StoreArgument,
    budget: Annotated[str, typer.Option(metavar="SIZE", help="Keep at most this much, e.g. 20GB.")] = "",
    older_than: Annotated[
        str, typer.Option(metavar="TIME", help="Delete what has not been used for this long, e.g. 30d or 12h.")
    ] = "",
    eviction: Annotated[
        str,
        typer.Option(
            help="Which chunks go first to meet the budget: lru (the least recently used chunk) or front-first (of the least "
            "recently used prompt, the chunk nearest to its start, which is the cheapest to compute)."
        ),
    ] = LRU,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
) -> None:
    """Delete chunks by age or for a budget; exit code 1 if some could not be deleted.

    Processes that use the store are not disturbed: they finish the reads that
    they have started, and compute what is gone when its prompt comes again.
    Pinned chunks stay (`cake-hf pin`). For directories only: buckets and servers have rules of their own
    (lifecycle, maxmemory).
    """
    if not budget and not older_than:
        raise ValueError("Say what may be deleted: --budget 20GB, --older-than 30d, or both.")
    most = parse_bytes(budget) if budget else None
    age = parse_seconds(older_than) if older_than else None
    with existing_store(store) as opened:
        if not isinstance(opened, LocalStore):
            raise StoreError(
                f"{shown_url(store)} is not a directory; gc works on directories only. Use the server's own rules there."
            )
        with progress_bar("reading headers", "chunks") as show:
            selection = select(opened, most, age, eviction, time.time(), show)
        show_selection(selection, older_than)
        if dry_run:
            console.print("\nNothing was deleted: this is a dry run.")
            return
        with progress_bar("deleting", "chunks") as show:
            collected = collect(opened, selection, show)
    show_collected(collected)
    if collected.failed or (most is not None and total_bytes(selection.all) - total_bytes(collected.gone) > most):
        raise typer.Exit(WRONG)


def select(
    store: LocalStore, budget: int | None, age: float | None, eviction: str, now: float, progress: Progress
) -> Selection:
    """Chooses the chunks to delete.

    Args:
        store: a directory.
        budget: the most bytes that may stay; None for no limit.
        age: seconds without use after which a chunk is deleted; None for never.
        eviction: the order of deletion, see `stores.eviction`.
        now: seconds since the epoch.
        progress: called with (headers read, all chunks), if headers are needed.

    Raises:
        StoreError: the directory cannot be looked at.
        ValueError: there is no such eviction.
    """
    entries, pins = store.entries(), store.pinned()
    pinned = [entry for entry in entries if entry.key in pins]
    may_go = [entry for entry in entries if entry.key not in pins]
    old = [entry for entry in may_go if age is not None and entry.used < now - age]
    gone = {entry.key for entry in old}
    rest = [entry for entry in may_go if entry.key not in gone]
    over: list[Entry] = []
    excess = 0 if budget is None else total_bytes(rest) + total_bytes(pinned) - budget
    for entry in _order(store, eviction, rest, progress)(rest):
        if excess <= 0:
            break
        over.append(entry)
        excess -= entry.nbytes
    return Selection(entries, old, over, pinned)


def collect(store: LocalStore, selection: Selection, progress: Progress) -> Collected:
    """Deletes the selected chunks, except those that are in use again, and removes files left by killed writers."""
    gone: list[Entry] = []
    failed: dict[str, str] = {}
    goes = [*selection.old, *selection.over]
    for count, entry in enumerate(goes, start=1):
        try:
            if store.evict(entry):
                gone.append(entry)
        except StoreError as error:
            failed[entry.key] = shown(error)
        progress(count, len(goes))
    return Collected(gone, len(goes) - len(gone) - len(failed), failed, store.sweep())


def show_selection(selection: Selection, older_than: str) -> None:
    """Shows chunks and bytes, before and after."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(justify="right")
    rows = [("in the store", selection.all)]
    rows += [("pinned", selection.pinned)] if selection.pinned else []
    rows += [(f"not used for {older_than}", selection.old)] if older_than else []
    for label, entries in [*rows, ("over the budget", selection.over)]:
        table.add_row(label, count_text(len(entries), "chunk"), bytes_text(total_bytes(entries)))
    count = len(selection.all) - len(selection.old) - len(selection.over)
    table.add_row("left", count_text(count, "chunk"), bytes_text(selection.left))
    console.print(table)


def show_collected(collected: Collected) -> None:
    """Shows what was deleted, and what was not."""
    freed = bytes_text(total_bytes(collected.gone))
    deleted = (f"{count_text(len(collected.gone), 'chunk')} deleted", "green")
    console.print(Text.assemble("\n", deleted, f", {freed} are free again."))
    if collected.swept:
        console.print(f"{count_text(collected.swept, 'file')} of killed writers removed.")
    if collected.in_use:
        console.print(
            f"{count_text(collected.in_use, 'chunk')} used meanwhile and kept; run it again if it must go, too."
        )
    for why in list(collected.failed.values())[:3]:
        console.print(Text(shown(why), style="red"))
    if collected.failed:
        console.print(f"{count_text(len(collected.failed), 'chunk')} could not be deleted.", style="bold red")


def total_bytes(entries: Sequence[Entry]) -> int:
    """Returns the total size of some chunks, in bytes."""
    return sum(entry.nbytes for entry in entries)


def _order(store: LocalStore, eviction: str, entries: Sequence[Entry], progress: Progress) -> Order:
    """Returns the order of deletion; front-first needs the places of all chunks, which it reads."""
    places: dict[str, ChunkPosition | None] = {}
    if eviction == FRONT_FIRST:
        with closing(each_answer([entry.key for entry in entries], store.place)) as answers:
            for key, place in answers:
                places[key] = place
                progress(len(places), len(entries))
    return order_named(eviction, places.get)
