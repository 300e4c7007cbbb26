"""`cake-hf pin`: protects chunks from eviction for some time."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from cake_hf.cli.console import console, progress_bar
from cake_hf.cli.inspect_store import Inventory, StoredChunk, existing_store, take_inventory
from cake_hf.cli.options import StoreArgument, WarmedOptions, flat_options
from cake_hf.cli.selecting import Naming, choose
from cake_hf.cli.sheets import Sheet
from cake_hf.errors import StoreError
from cake_hf.stores import LocalStore
from cake_hf.util.redaction import shown_url
from cake_hf.util.sizes import bytes_text, count_text, parse_seconds

NOTHING = "Say what to keep: --prompt FILE --model MODEL, --model MODEL, --namespace DIGITS or --chunk DIGITS."


@flat_options
def pin_command(
    store: StoreArgument,
    naming: Naming,
    warmed: WarmedOptions,
    time_to_live: Annotated[
        str, typer.Option("--for", metavar="TIME", help="How long to keep it, e.g. 7d or 12h.")
    ] = "",
    off: Annotated[bool, typer.Option("--off", help="Remove the pins.")] = False,
) -> None:
    """Keep the KV of a document, a model or a namespace for some time; without any of these, show what is pinned.

    Neither a store's budget nor `cake-hf gc` evicts pinned chunks until their
    time is over; `cake-hf rm` deletes them. For directories only.
    """
    showing = not (naming.ways or time_to_live or off)
    if not showing:
        naming.refuse_unclear(NOTHING)
        if off == bool(time_to_live):
            raise ValueError("Say for how long, as in --for 7d, or take the pins away with --off.")
    seconds = parse_seconds(time_to_live) if time_to_live else 0.0
    with existing_store(store) as opened:
        if not isinstance(opened, LocalStore):
            raise StoreError(f"{shown_url(store)} is not a directory; chunks are pinned in directories only.")
        with progress_bar("reading headers", "chunks") as progress:
            inventory = take_inventory(opened, progress)
        if showing:
            console.print(_pinned(opened, inventory))
            return
        keys = choose(opened, inventory, naming, warmed).stored(inventory)
        until = time.time() + seconds
        count = opened.unpin(keys) if off else opened.pin(keys, until)
    if off:
        console.print(f"{count_text(count, 'pin')} taken away.")
        return
    told = bytes_text(sum(chunk.file_bytes for key, chunk in _all(inventory).items() if key in set(keys)))
    console.print(Text.assemble((f"{count_text(count, 'chunk')} pinned", "green"), f", {told}, until {_date(until)}."))


def _pinned(store: LocalStore, inventory: Inventory) -> RenderableType:
    """Shows what is pinned, by model and date."""
    there = _all(inventory)
    groups: dict[tuple[int, str], list[int]] = {}
    for key, until in store.pinned().items():
        if key in there:
            groups.setdefault((until, there[key].metadata.model), []).append(there[key].file_bytes)
    if not groups:
        return Text("Nothing is pinned.")
    rows = [
        [_date(until), model, f"{len(sizes):,}", bytes_text(sum(sizes))]
        for (until, model), sizes in sorted(groups.items())
    ]
    return Sheet("pinned", ("<until", "<model", "chunks", "bytes"), rows)


def _all(inventory: Inventory) -> dict[str, StoredChunk]:
    return {**inventory.chunks, **inventory.states}


def _date(seconds: float) -> str:
    """Returns a date in this machine's time zone."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):
        return "the end of time"
