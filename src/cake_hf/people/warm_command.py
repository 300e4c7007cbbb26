"""`cake-hf warm`: a document's KV into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cake_hf.arithmetic.environment import STORE
from cake_hf.people.options import ChunkSize, Device, Dtype, DtypeOption
from cake_hf.people.warm import WarmJob, show_warmed, warm


def warm_command(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the Hugging Face Hub.")],
    file: Annotated[Path, typer.Argument(help="A text file; prompts that start with its text will be fast.")],
    store: Annotated[
        str, typer.Option(envvar=STORE, help="Where the KV goes: a directory (made when missing) or a URL.")
    ],
    chunk_size: ChunkSize = None,
    salt: Annotated[str, typer.Option(help="Separates tenants: only prompts with the same salt find it.")] = "",
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    exact: Annotated[bool, typer.Option(help="Serve only the very same numerics, bit for bit.")] = True,
    tokens: Annotated[int | None, typer.Option(min=1, help="Take only so many tokens from the start.")] = None,
    prompt: Annotated[
        bool, typer.Option("--prompt", help="Prompts go on from its very end: keep the last tokens, too.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="In the model's chat template, as the beginning of the user's first message.")
    ] = False,
    system: Annotated[Path | None, typer.Option(help="With --chat: a text file with the system prompt.")] = None,
) -> None:
    """Compute a document's KV once and keep it in a store."""
    job = WarmJob(model, file, store, chunk_size, salt, exact, dtype.value, device, tokens, prompt, chat, system)
    show_warmed(job, warm(job))
