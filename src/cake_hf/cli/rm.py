"""`cake-hf rm`: delete chunks by document, model or namespace."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from cake_hf.arithmetic.errors import StoreError
from cake_hf.arithmetic.outside import shown, shown_url
from cake_hf.arithmetic.sizes import bytes_text, count_text
from cake_hf.cli.console import WRONG, console, progress_bar
from cake_hf.cli.inspect_store import existing_store, take_inventory
from cake_hf.cli.options import ChunkSize, Device, Dtype, DtypeOption, StoreArgument
from cake_hf.cli.selecting import LastChunk, ModelName, NamespaceDigits, Prompts, Wanted, choose
from cake_hf.stores import LocalStore, Store

NOTHING = (
    "Say what is to go: --prompt FILE --model MODEL, --model MODEL, --namespace DIGITS or --chunk DIGITS; `cake-hf ls STORE` "
    "shows what is there, and `cake-hf gc` makes room."
)


def rm_command(
    store: StoreArgument,
    prompt: Prompts = None,
    model: ModelName = "",
    namespace: NamespaceDigits = "",
    chunk: LastChunk = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    chunk_size: ChunkSize = None,
    salt: Annotated[str, typer.Option(help="That the document was warmed with.")] = "",
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    exact: Annotated[bool, typer.Option(help="As the document was warmed.")] = True,
    tokens: Annotated[int | None, typer.Option(min=1, help="As the document was warmed.")] = None,
) -> None:
    """Delete the KV of a document, a model or a namespace; exit code 1 if some could not be deleted.

    With a document goes what goes on from it, such as questions about it.
    Chunks that other prompts begin with, too, stay. What is deleted is
    computed again when its prompt comes; pinned chunks are deleted, too.
    """
    wanted = Wanted(
        tuple(prompt or ()), model, namespace, chunk, chunk_size or "auto", salt, exact, dtype.value, device, tokens
    )
    wanted.refuse_unclear(NOTHING)
    with existing_store(store) as opened:
        if opened.read_only:
            raise StoreError(f"{shown_url(store)} can only be read; nothing is deleted there.")
        with progress_bar("reading headers", "chunks") as progress:
            inventory = take_inventory(opened, progress)
        keys, shared = choose(opened, inventory, wanted).to_delete(inventory)
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
    """Delete these, and take their pins away; why some could not be deleted."""
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
