"""`cake-hf ls` and `cake-hf info`: the content of a store, from the chunks' headers."""

from __future__ import annotations

from typing import Annotated

import typer

from cake_hf.cli.console import console, progress_bar
from cake_hf.cli.inspect_store import existing_store, find_chunk, take_inventory
from cake_hf.cli.keeping import what_it_keeps
from cake_hf.cli.options import StoreArgument
from cake_hf.cli.store_tables import chunk_table, listing, records_of, totals
from cake_hf.util.redaction import shown_url


def ls_command(
    store: StoreArgument,
    prompts: Annotated[int, typer.Option(min=0, help="Show at most this many prompts, the longest ones.")] = 20,
) -> None:
    """List the content of a store by namespace and by prompt (reads only the chunks' headers)."""
    with existing_store(store) as opened, progress_bar("reading headers", "chunks") as progress:
        inventory, known = take_inventory(opened, progress), records_of(opened)
    console.print(listing(inventory, prompts, known))


def info_command(
    store: StoreArgument,
    key: Annotated[str, typer.Argument(help="The first digits of a chunk's key.")] = "",
) -> None:
    """Show the totals of a store, or the whole header of one chunk."""
    with existing_store(store) as opened:
        if key:
            console.print(chunk_table(find_chunk(opened, key)))
            return
        with progress_bar("reading headers", "chunks") as progress:
            inventory = take_inventory(opened, progress)
        kept = what_it_keeps(opened)
    console.print(totals(shown_url(store), inventory))
    if kept:
        console.print(f"\n{kept}")
