"""The command line: what can be asked for. What is done stands in the modules beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import cake_hf
from cake_hf.arithmetic.environment import STORE
from cake_hf.people.bench import bench_app
from cake_hf.people.console import WRONG, PlainErrors, console, progress_bar
from cake_hf.people.demo.play import DemoOptions, play
from cake_hf.people.gc import gc_command
from cake_hf.people.inspect_store import existing_store, find_chunk, take_inventory
from cake_hf.people.models import Dtype
from cake_hf.people.options import ChunkSize, Device, DtypeOption, StoreArgument
from cake_hf.people.packs.commands import pull_command, push_command
from cake_hf.people.plan import plan_command
from cake_hf.people.simulate import simulate_command
from cake_hf.people.store_tables import chunk_facts, listing, totals
from cake_hf.people.verify_command import verify_command
from cake_hf.people.warm import WarmJob, show_warmed, warm

app = typer.Typer(
    name="cake-hf",
    cls=PlainErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Keep the KV of long prompts in a store, and look at what is there.",
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=lambda asked: _show_version(asked), is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Keep the KV of long prompts in a store, and look at what is there."""


@app.command("warm")
def warm_command(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the Hugging Face Hub.")],
    file: Annotated[Path, typer.Argument(help="A text file; prompts that start with its text will be fast.")],
    store: Annotated[
        str, typer.Option(envvar=STORE, help="Where the KV goes: a directory (made when missing) or a URL.")
    ],
    chunk_size: ChunkSize = 512,
    salt: Annotated[str, typer.Option(help="Separates tenants: only prompts with the same salt find it.")] = "",
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    exact: Annotated[bool, typer.Option(help="Serve only the very same numerics, bit for bit.")] = True,
    tokens: Annotated[int | None, typer.Option(min=1, help="Take only so many tokens from the start.")] = None,
) -> None:
    """Compute a document's KV once and keep it in a store."""
    job = WarmJob(model, file, store, chunk_size, salt, exact, dtype.value, device, tokens)
    show_warmed(job, warm(job))


@app.command("ls")
def ls_command(
    store: StoreArgument,
    prompts: Annotated[int, typer.Option(min=0, help="Show so many prompts at most, the longest.")] = 20,
) -> None:
    """List what a store has, by namespace and by prompt (reads only the chunks' headers)."""
    with existing_store(store) as opened, progress_bar("reading headers", "chunks") as progress:
        inventory = take_inventory(opened, progress)
    console.print(listing(inventory, prompts))


@app.command("info")
def info_command(
    store: StoreArgument,
    key: Annotated[str, typer.Argument(help="The first digits of a chunk's key.")] = "",
) -> None:
    """Show the totals of a store, or all that one chunk says about itself."""
    with existing_store(store) as opened:
        if key:
            console.print(chunk_facts(find_chunk(opened, key)))
            return
        with progress_bar("reading headers", "chunks") as progress:
            inventory = take_inventory(opened, progress)
    console.print(totals(store, inventory))


@app.command("demo")
def demo_command(
    model: Annotated[str, typer.Option(help="A folder or a name on the Hub; recall-tiny comes with the package.")] = "",
    file: Annotated[
        Path | None, typer.Option(help="Your text; by default source files of the installed Python.")
    ] = None,
    question: Annotated[str, typer.Option(help="Your question; by default facts are hidden and asked for.")] = "",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the text. [default: 8192, or all of FILE]")
    ] = None,
    chunk_size: ChunkSize = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of the race.")] = 3,
    store: Annotated[Path | None, typer.Option(help="Keep the KV here; by default it is removed afterwards.")] = None,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
) -> None:
    """Ask a question about a long text, cold and warm, in fresh processes; exit code 1 if a single bit differs."""
    options = DemoOptions(model, file, question, tokens, chunk_size, new_tokens, repeats, store, dtype.value, device)
    if not play(options).good:
        raise typer.Exit(WRONG)


app.command("verify")(verify_command)
app.command("gc")(gc_command)
app.add_typer(bench_app, name="bench")
app.command("plan")(plan_command)
app.command("push")(push_command)
app.command("pull")(pull_command)
app.command("simulate")(simulate_command)


def _show_version(asked: bool) -> None:
    if asked:
        console.print(f"cake-hf {cake_hf.__version__}")
        raise typer.Exit
