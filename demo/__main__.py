"""`python -m demo`, in a checkout: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cake_hf.cli.console import WRONG, PlainErrors
from cake_hf.cli.options import Device, Dtype, DtypeOption
from cake_hf.limits import MIN_CHUNK_SIZE
from demo.play import DemoOptions, play

app = typer.Typer(
    cls=PlainErrors, invoke_without_command=True, add_completion=False, pretty_exceptions_show_locals=False
)


@app.callback()
def demo(
    model: Annotated[str, typer.Option(help="A folder or a name on the Hub; recall-tiny comes with the package.")] = "",
    file: Annotated[
        Path | None, typer.Option(help="Your text; by default source files of the installed Python.")
    ] = None,
    question: Annotated[str, typer.Option(help="Your question; by default facts are hidden and asked for.")] = "",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the text. [default: 8192, or all of FILE]")
    ] = None,
    chunk_size: Annotated[int, typer.Option(min=MIN_CHUNK_SIZE, help="Tokens per chunk; part of the key.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Number of rounds of the race.")] = 3,
    store: Annotated[
        Path | None, typer.Option(help="Keep the KV in this directory; by default it is removed afterwards.")
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
) -> None:
    """Ask a question about a long text, cold and warm, in fresh processes; exit code 1 if a single bit differs."""
    options = DemoOptions(model, file, question, tokens, chunk_size, new_tokens, repeats, store, dtype.value, device)
    if not play(options).good:
        raise typer.Exit(WRONG)


if __name__ == "__main__":
    app(prog_name="python -m demo")
