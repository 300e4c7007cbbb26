"""`cake-hf why`: whether a prompt is found in a store, and if not, whether it is there from other circumstances."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.padding import Padding
from rich.text import Text

from cake_hf.arithmetic.keys import chunk_keys
from cake_hf.arithmetic.outside import shown_url
from cake_hf.arithmetic.sizes import count_text
from cake_hf.cache.misses import Elsewhere, Sought, explanation, found_elsewhere
from cake_hf.cli.console import WRONG, console
from cake_hf.cli.inspect_store import existing_store
from cake_hf.cli.models import load_model, load_tokenizer, read_text
from cake_hf.cli.options import ChunkSize, Device, Dtype, DtypeOption, StoreArgument
from cake_hf.packs.contents import session_for
from cake_hf.stores import Store
from cake_hf.stores.differences import in_a_sentence
from cake_hf.stores.records import records

SHORT = 12
"""Digits of a namespace that are shown, as by `cake-hf ls`."""


@dataclass(frozen=True)
class Found:
    """Where a prompt is.

    Attributes:
        chunks: full chunks that it has here.
        stored: how many of these a cache would find.
        chunk_size: of a chunk, in tokens.
        elsewhere: namespaces that others of its chunks are stored under.
        otherwise: why there is nothing at all, as a clause; empty where that is not known.
    """

    chunks: int
    stored: int
    chunk_size: int
    elsewhere: Sequence[Elsewhere] = ()
    otherwise: str = ""


def why_command(
    store: StoreArgument,
    model: Annotated[str, typer.Option(help="A model's folder, or its name on the Hugging Face Hub.")],
    prompt: Annotated[Path, typer.Option(help="A text file with the prompt.")],
    chunk_size: ChunkSize = None,
    salt: Annotated[str, typer.Option(help="As the cache has it; of what is under another one nothing is said.")] = "",
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    exact: Annotated[bool, typer.Option(help="As the cache has it.")] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch, as the process has them that you ask for.")
    ] = None,
) -> None:
    """Say whether a prompt is found in a store, and if not, why; exit code 1 if none of it is.

    Give the options that the cache has. Where chunks of the prompt are stored
    that were made otherwise (another number of threads, kind of attention,
    chunk size, dtype, version, processor, revision or adapter), it says what
    would have to be alike.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with existing_store(store) as opened:
        found = _look(opened, model, read_text(prompt), chunk_size or "auto", salt, dtype.value, device, exact=exact)
    show_found(found, shown_url(store))
    if not found.stored:
        raise typer.Exit(WRONG)


def show_found(found: Found, store: str) -> None:
    """What a cache would find, then where the prompt is besides."""
    if not found.chunks:
        console.print(f"The prompt has less than one chunk of {found.chunk_size} tokens: a cache stores nothing of it.")
    else:
        style = "green" if found.stored else "bold red"
        told = f"{found.stored:,} of {count_text(found.chunks, 'chunk')} of this prompt"
        console.print(Text.assemble((told, style), f" would be found in {store}."), soft_wrap=True)
    for one in found.elsewhere:
        saved = time.strftime("%Y-%m-%d", time.gmtime(one.record.last))
        head = f"Namespace {one.record.namespace[:SHORT]} has {one.stored:,} of {count_text(len(one.keys), 'chunk')}"
        console.print(Text(f"\n{head}, saved last on {saved}:"), soft_wrap=True)
        console.print(Padding(Text(f"{in_a_sentence(one.differences)}."), (0, 0, 0, 2)))
    if found.otherwise:
        console.print(Text(f"\nSo {found.otherwise}."))
    elif found.chunks and not found.stored and not found.elsewhere:
        console.print(
            "\nNothing else is known to have been made of it. Compare the starts of the prompts: one token that differs "
            "changes all that follow. (Stores filled by cake_hf 0.1 do not tell what their chunks were made with.)"
        )


def _look(
    store: Store, model: str, text: str, chunk_size: int | str, salt: str, dtype: str, device: str, *, exact: bool
) -> Found:
    with console.status("loading the model"):
        tokenizer, loaded = load_tokenizer(model), load_model(model, dtype, device)
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].to(torch.int64).numpy().data
    with session_for(loaded, store, chunk_size=chunk_size, salt=salt, exact=exact) as session:
        namespace, facts, name, size = (
            session.namespace(),
            session.latest_facts(),
            session.model_name,
            session.chunk_size,
        )
    keys = chunk_keys(namespace, tokens, size)
    stored = sum(map(bool, store.contains(keys))) if keys else 0
    sought = Sought(namespace, facts, salt, name, tokens, lambda size: [])
    elsewhere = found_elsewhere(store, sought, records(store), all_chunks=True)
    otherwise = ""
    if keys and not stored and not elsewhere:
        otherwise = store.objection(namespace, partial(dict, facts)) or explanation(store, sought)
    return Found(len(keys), stored, size, elsewhere, otherwise)
