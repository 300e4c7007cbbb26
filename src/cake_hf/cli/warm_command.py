"""`cake-hf warm`: puts the KV of documents into a store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cake_hf.cli.console import console
from cake_hf.cli.keeping import said_of_new
from cake_hf.cli.models import HELP as MODEL
from cake_hf.cli.models import read_text
from cake_hf.cli.options import Boundaries, Chat, ChunkSize, Codec, CodecOption, Device, Dtype, DtypeOption, System
from cake_hf.cli.warm import WarmJob, load, show_warmed, warm
from cake_hf.cli.warm_many import documents_in, show_many, warm_many
from cake_hf.util.environment import STORE


def warm_command(
    model: Annotated[str, typer.Argument(help=MODEL)],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Text files, or folders of them; prompts that start with such a text will be fast."
        ),
    ],
    store: Annotated[
        str, typer.Option(envvar=STORE, help="The store for the KV: a directory (created if missing) or a URL.")
    ],
    chunk_size: ChunkSize = None,
    salt: Annotated[str, typer.Option(help="Separates tenants: only prompts with the same salt find the KV.")] = "",
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    exact: Annotated[bool, typer.Option(help="Serve only processes with the same numerics, bit for bit.")] = True,
    tokens: Annotated[int | None, typer.Option(min=1, help="Use only this many tokens from the start.")] = None,
    keep_words: Annotated[
        bool, typer.Option("--keep-words", help="Store the text's first words, which ls shows; not with a salt.")
    ] = False,
    prompt: Annotated[
        bool, typer.Option("--prompt", help="Prompts continue from the text's very end: keep its last tokens, too.")
    ] = False,
    boundary: Boundaries = None,
    chat: Chat = False,
    system: System = None,
    codec: CodecOption = Codec.NONE,
) -> None:
    """Compute the KV of documents once and keep it in a store."""
    job = WarmJob(
        model,
        files[0],
        store,
        chunk_size,
        salt,
        exact,
        dtype.value,
        device,
        tokens,
        keep_words,
        prompt,
        chat,
        system,
        tuple(boundary or ()),
        codec.value,
    )
    documents, told = documents_in(files), said_of_new(store)
    for file in documents if len(documents) == 1 else filter(documents.__contains__, files):
        read_text(file)  # before the model is loaded
    if told:
        console.print(told, style="dim")
    if len(documents) == 1:
        loaded, job = load(job), replace(job, file=documents[0])
        show_warmed(job, warm(job, loaded), has_template=bool(getattr(loaded[0], "chat_template", None)))
        return
    show_many(job, warm_many(job, documents, files, load(job)))
