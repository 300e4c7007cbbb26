"""`cake-hf stats`: how much of the prompts came from a store, day by day."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from cake_hf.cli.console import console
from cake_hf.cli.inspect_store import existing_store
from cake_hf.cli.options import StoreArgument
from cake_hf.cli.sheets import Sheet
from cake_hf.errors import StoreError
from cake_hf.stores.safe_paths import advice
from cake_hf.transfer.hits import Hits, read_hits
from cake_hf.util.redaction import shown_url
from cake_hf.util.sizes import bytes_text

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
