"""`cake-hf ls`, `info` and `stats`: the content of a store as tables, from the chunks' headers, and how much came from it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cake_hf.cli.console import console, progress_bar
from cake_hf.cli.inspect_store import (
    Chain,
    Inventory,
    Namespace,
    StoredChunk,
    chunk_sizes,
    existing_store,
    find_chunk,
    namespaces,
    prompts,
    take_inventory,
    total_file_bytes,
)
from cake_hf.cli.keeping import what_it_keeps
from cake_hf.cli.options import StoreArgument
from cake_hf.cli.sheets import Sheet
from cake_hf.errors import StoreError
from cake_hf.stores import Store
from cake_hf.stores.records import Record, records
from cake_hf.stores.safe_paths import advice
from cake_hf.transfer.hits import Hits, read_hits
from cake_hf.util.redaction import shown, shown_url
from cake_hf.util.sizes import bytes_text, count_text

SHORT = 12
"""Digits of a key or a digest that are shown; enough for `cake-hf info STORE KEY` to find it."""


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


def listing(inventory: Inventory, most_prompts: int, known: Mapping[str, Record]) -> RenderableType:
    """Shows all namespaces, then the longest prompts."""
    if not inventory.chunks and not inventory.unreadable:
        return Text("The store is empty; `cake-hf warm MODEL FILE --store DIR` fills it.")
    chains = prompts(inventory)
    parts: list[RenderableType] = [
        _namespace_table(namespaces(inventory), known),
        Text(),
        _prompt_table(
            chains[:most_prompts],
            chunk_sizes(inventory),
            [first_words(chain, inventory, known) for chain in chains[:most_prompts]],
        ),
    ]
    if len(chains) > most_prompts:
        parts.append(Text(f"... and {len(chains) - most_prompts} shorter prompts (--prompts shows more)", style="dim"))
    if others := len(inventory.states) + len(inventory.behaviours):
        parts.append(Text(f"... and {_others(others)}, as `cake-hf verify` and gc count them", style="dim"))
    return Group(*parts, *_unreadable_note(inventory))


def _others(count: int) -> str:
    return f"{count_text(count, 'chunk')} of states or recorded results"


def totals(name: str, inventory: Inventory) -> RenderableType:
    """Shows a store as a whole."""
    models = sorted({chunk.metadata.model for chunk in inventory.chunks.values()})
    others = len(inventory.states) + len(inventory.behaviours)
    table = _pairs_table(
        [
            ("store", name),
            ("chunks", f"{len(inventory.chunks) + others:,}{f' ({_others(others)})' if others else ''}"),
            ("tokens", f"{inventory.tokens:,}"),
            ("bytes", bytes_text(inventory.file_bytes)),
            ("prompts", f"{len(prompts(inventory)):,}"),
            ("namespaces", f"{len(namespaces(inventory)):,}"),
            ("models", ", ".join(models) or "none"),
        ]
    )
    return Group(table, *_unreadable_note(inventory))


def chunk_table(chunk: StoredChunk) -> RenderableType:
    """Shows the whole header of one chunk."""
    metadata = chunk.metadata
    return _pairs_table(
        [
            ("key", metadata.key),
            ("parent", metadata.parent if metadata.index else "none (the prompt's first chunk)"),
            ("chunk", f"number {metadata.index} of its prompt, {chunk.chunk_size:,} tokens"),
            ("namespace", metadata.namespace),
            ("model", metadata.model),
            ("tensors", f"{len(chunk.table)} of {chunk.table.dtypes}, {' and '.join(map(str, chunk.table.shapes))}"),
            ("bytes", f"{chunk.file_bytes:,} ({bytes_text(chunk.file_bytes)}){_encoded(chunk)}"),
            ("checksums", f"{len(metadata.checksums)}, one per tensor (xxh3-128)"),
        ]
    )


def _encoded(chunk: StoredChunk) -> str:
    if chunk.codec == "none":
        return ""
    return f", {chunk.codec}: {chunk.payload_bytes / chunk.table.payload_bytes:.2f} of the KV's"


def _namespace_table(found: Sequence[Namespace], known: Mapping[str, Record]) -> Table:
    table = _table("namespaces", ["namespace", "model", "dtype"], ["chunk size", "chunks", "tokens", "bytes"])
    table.add_column("exact", overflow="fold")
    table.add_column("saved", overflow="fold", no_wrap=True)
    for namespace in found:
        first, count, record = namespace.first, len(namespace.chunks), known.get(namespace.digest)
        table.add_row(
            Text(namespace.digest[:SHORT]),
            Text(_short_name(first.metadata.model)),
            Text(first.table.dtypes),
            str(first.chunk_size),
            f"{count:,}",
            f"{namespace.tokens:,}",
            bytes_text(total_file_bytes(namespace.chunks)),
            "?" if record is None else "yes" if record.exact else "no",
            "?" if record is None else time.strftime("%Y-%m-%d", time.gmtime(record.last)),
        )
    return table


def _prompt_table(chains: Sequence[Chain], sizes: Mapping[str, int], words: Sequence[str]) -> Table:
    table = _table("prompts", ["last chunk", "model"], ["tokens", "chunks"])
    table.add_column("missing", overflow="fold")
    if any(words):
        table.add_column("first words", overflow="fold")
    for chain, begin in zip(chains, words, strict=True):
        metadata = chain.leaf.metadata
        missing = "none" if not chain.first else f"chunk {chain.first - 1}; those before it may be stored"
        cells = [
            metadata.key[:SHORT],
            _short_name(metadata.model),
            f"{chain.tokens(sizes[metadata.namespace]):,}",
            f"{chain.chunks:,}",
            missing,
        ]
        table.add_row(*map(Text, [*cells, begin] if any(words) else cells))
    return table


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """Returns a table that leaves out no column on a narrow terminal: cells that do not fit go on in the next line."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for number, heading in enumerate(texts):
        table.add_column(heading, overflow="fold", no_wrap=number == 0)  # text to be copied stays in one line
    for heading in numbers:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _pairs_table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(shown(value)))
    return table


def _short_name(model: str) -> str:
    """Returns a name on the Hub unchanged, and the last part of a path."""
    return model.rstrip("/").rpartition("/")[2] if model.startswith(("/", ".", "~")) else model


def _unreadable_note(inventory: Inventory) -> list[Text]:
    if not inventory.unreadable:
        return []
    count = count_text(len(inventory.unreadable), "chunk")
    return [Text(f"{count} cannot be read; `cake-hf verify STORE` says why.", style="red")]


def records_of(store: Store) -> dict[str, Record]:
    """Returns for each namespace what its chunks were made with, as far as the store knows; nothing if the store fails."""
    try:
        return {record.namespace: record for record in records(store)}
    except StoreError:
        return {}


def first_words(chain: Chain, inventory: Inventory, known: Mapping[str, Record]) -> str:
    """Returns the first words of a prompt, or of the document that it starts with; empty if none are kept."""
    record = known.get(chain.leaf.metadata.namespace)
    chunk: StoredChunk | None = chain.leaf if record is not None and record.words else None
    while record is not None and chunk is not None:
        if words := record.words.get(chunk.metadata.key):
            return words
        above = inventory.chunks.get(chunk.metadata.parent)
        chunk = above if above is not None and above.metadata.index == chunk.metadata.index - 1 else None
    return ""


BAR = 20
"""Cells of the bar that stands for all tokens."""


def stats_command(
    store: StoreArgument,
    days: Annotated[int, typer.Option(min=1, help="Show at most this many days, the latest ones.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all days instead.")] = False,
) -> None:
    """Show how many prompts, and how much of them, came from a store, day by day (in UTC).

    The caches that write to the store count in a file beside its chunks;
    those with save=False, and other kinds of stores, leave no trace.
    """
    with existing_store(store) as opened:
        folder = opened.notes_folder()
        if folder is None:
            raise StoreError(
                f"{shown_url(store)} keeps no notes on this machine; hits are counted in directories only."
            )
        try:
            found = read_hits(folder)
        except OSError as error:
            raise StoreError(f"The hits in {folder} cannot be read: {advice(error)}") from error
    if as_json:
        typer.echo(json.dumps({day: asdict(hits) for day, hits in found.items()}))
        return
    console.print(_days(found, days))


def _days(found: Mapping[str, Hits], most: int) -> RenderableType:
    if not found:
        return Text("No prompt has been counted yet.")
    shown = list(found.items())[-most:]
    total = sum((hits for _, hits in shown), start=Hits())
    rows = [_row(day, hits) for day, hits in [*shown, ("together", total)]]
    headings = ("<day", "prompts", "hits", "tokens", "from the store", "share", "loaded", "<")
    parts: list[RenderableType] = [Sheet("", headings, [*rows[:-1], [], rows[-1]])]
    if len(found) > len(shown):
        parts.append(Text(f"... and {len(found) - len(shown)} earlier days (--days shows more)", style="dim"))
    return Group(*parts)


def _row(day: str, hits: Hits) -> list[str | Text]:
    share = hits.tokens_loaded / hits.tokens if hits.tokens else 0.0
    numbers = [f"{number:,}" for number in (hits.prompts, hits.with_hits, hits.tokens, hits.tokens_loaded)]
    block = "#" if console.options.ascii_only else "█"
    return [
        day,
        *numbers,
        f"{share:.0%}",
        bytes_text(hits.bytes_loaded),
        Text(block * round(BAR * share), "dodger_blue3"),
    ]
