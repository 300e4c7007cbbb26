"""`cake-hf rm`: deletes chunks by document, model or namespace."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from cake_hf.cli.console import WRONG, console, progress_bar
from cake_hf.cli.inspect_store import existing_store, take_inventory
from cake_hf.cli.options import StoreArgument, WarmedOptions, flat_options
from cake_hf.cli.selecting import Naming, choose
from cake_hf.errors import StoreError
from cake_hf.stores import LocalStore, Store
from cake_hf.util.redaction import shown, shown_url
from cake_hf.util.sizes import bytes_text, count_text

NOTHING = (
    "Say what to delete: --prompt FILE --model MODEL, --model MODEL, --namespace DIGITS or --chunk DIGITS; `cake-hf ls STORE` "
    "shows what is there, and `cake-hf gc` makes room."
)


@flat_options
def rm_command(
    store: StoreArgument,
    naming: Naming,
    warmed: WarmedOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
) -> None:
    """Delete the KV of a document, a model or a namespace; exit code 1 if some could not be deleted.

    With a document goes all that continues it, such as questions about it.
    Chunks that other prompts start with, too, stay. What is deleted is
    computed again when its prompt comes; pinned chunks are deleted, too.
    """
    naming.refuse_unclear(NOTHING)
    with existing_store(store) as opened:
        if opened.read_only:
            raise StoreError(f"{shown_url(store)} can only be read; nothing is deleted there.")
        with progress_bar("reading headers", "chunks") as progress:
            inventory = take_inventory(opened, progress)
        keys, shared = choose(opened, inventory, naming, warmed).to_delete(inventory)
        sizes = {key: chunk.file_bytes for key, chunk in {**inventory.chunks, **inventory.states}.items()}
        told = f"{count_text(len(keys), 'chunk')}, {bytes_text(sum(sizes[key] for key in keys))}"
        if shared:
            console.print(f"{count_text(shared, 'chunk')} stay: other prompts begin with them, too.")
        if dry_run:
            console.print(f"{told} would be deleted. Nothing was: this is a dry run.")
            return
        failed = _delete(opened, keys)
    if not failed:
        console.print(Text.assemble((told, "green"), " deleted."))
        return
    console.print(f"{len(keys) - len(failed)} of {told} deleted.", style="bold red")
    for why in failed[:3]:
        console.print(Text(why, style="red"))
    raise typer.Exit(WRONG)


def _delete(store: Store, keys: list[str]) -> list[str]:
    """Deletes these chunks and their pins; returns why some could not be deleted."""
    failed = []
    with progress_bar("deleting", "chunks") as progress:
        for count, key in enumerate(keys, start=1):
            try:
                store.delete(key)
            except StoreError as error:
                failed.append(shown(error))
            progress(count, len(keys))
    if isinstance(store, LocalStore) and not failed:
        store.unpin(keys)
    return failed
