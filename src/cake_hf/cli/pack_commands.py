"""`cake-hf export`, `cake-hf push` and `cake-hf pull`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cake_hf.blocks import Block, blocks
from cake_hf.cli.console import console, errors, progress_bar
from cake_hf.cli.documents import load_with, read_warmed
from cake_hf.cli.inspect_store import existing_store
from cake_hf.cli.models import HELP as MODEL
from cake_hf.cli.models import load_model
from cake_hf.cli.options import Device, Dtype, DtypeOption, WarmedOptions, flat_options
from cake_hf.packs.card import cache_line, prefill_line
from cake_hf.packs.export import export_pack
from cake_hf.packs.importing import Imported, import_pack
from cake_hf.packs.publish import push_pack
from cake_hf.stores import Store
from cake_hf.stores.hub import SCHEME
from cake_hf.stores.manifest import PackManifest
from cake_hf.util.redaction import shown, shown_url
from cake_hf.util.sizes import bytes_text, count_text

Salt = Annotated[str, typer.Option(help="The salt that the KV was saved under.")]
Warmed = Annotated[str, typer.Argument(metavar="STORE", help="The store that was warmed with the prompt.")]


@dataclass(frozen=True)
class Published:
    """The content of a pack and of its card; the options that `export` and `push` share."""

    prompt: Annotated[Path, typer.Option(help="The text file whose KV goes into the pack.")]
    model: Annotated[str, typer.Option(help=MODEL)]
    allow_salted: Annotated[bool, typer.Option("--allow-salted", help="Publish KV that was saved under a salt.")] = (
        False
    )
    about: Annotated[
        str,
        typer.Option("--about", metavar="TEXT", help="A name for the prompt on the card; by default the file's name."),
    ] = ""
    base_model: Annotated[
        str, typer.Option(metavar="ORG/NAME", help="The model's name on the Hub for the card, if --model is a folder.")
    ] = ""


@flat_options
def export_command(
    store: Warmed,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A new or empty folder, or an older pack, which is replaced.")
    ],
    published: Published,
    warmed: WarmedOptions,
) -> None:
    """Write a prompt's KV to a folder, as a pack to be copied or put on a share; `pack:FOLDER` opens it.

    Give the options that the prompt was warmed with. If its end was kept, too
    (by `cake-hf warm` with --prompt or --chat), the pack contains it.
    """
    with (
        _prompt_of(store, published, warmed) as (opened, loaded, ids),
        progress_bar("writing", "files") as progress,
    ):
        manifest = export_pack(opened, folder, loaded, ids, progress=progress, **_options(published, warmed))
    named = blocks(0, ids.shape[1], warmed.boundary or (), manifest.chunk_size)
    _show_published("export", manifest, f"pack:{shown(str(folder))}", named)


@flat_options
def push_command(
    store: Warmed,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="ORG/NAME on the Hugging Face Hub; created if missing.")],
    published: Published,
    warmed: WarmedOptions,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Publish a prompt's KV on the Hugging Face Hub, where any CakeCache can load it.

    Give the options that the prompt was warmed with. If its end was kept, too
    (by `cake-hf warm` with --prompt or --chat), the pack contains it.
    """
    _refuse_folder(store, repo)
    with (
        _prompt_of(store, published, warmed) as (opened, loaded, ids),
        progress_bar("uploading", "files") as progress,
    ):
        pushed = push_pack(
            opened, repo, loaded, ids, private=private or None, progress=progress, **_options(published, warmed)
        )
    named = blocks(0, ids.shape[1], warmed.boundary or (), pushed.manifest.chunk_size)
    _show_published("push", pushed.manifest, pushed.url, named)


def _options(published: Published, warmed: WarmedOptions) -> dict[str, Any]:
    """Returns the options as `export_pack` and `push_pack` take them."""
    return {
        **warmed.keyed,
        "boundaries": warmed.boundary or (),
        "allow_salted": published.allow_salted,
        "about": published.about or f"the text file {published.prompt.name}",
        "base_model": published.base_model,
    }


@contextmanager
def _prompt_of(store: str, published: Published, warmed: WarmedOptions) -> Iterator[tuple[Store, Any, Any]]:
    """Returns the opened store, the loaded model, and the prompt's tokens, `[1, tokens]`."""
    document = read_warmed(published.prompt, warmed)
    with existing_store(store) as opened:
        loaded, [ids] = load_with(published.model, [document], warmed)
        yield opened, loaded, ids


def _refuse_folder(store: str, repo: str) -> None:
    """Refuses a folder as the name of a repository; the name of a folder within another one looks like a repository's.

    Raises:
        ValueError: it is a folder, or looks like a path.
    """
    is_path = repo.startswith((".", "/", "~", "$", "pack:", "file:")) or "\\" in repo or Path(repo).is_dir()
    if is_path or ("://" not in repo and repo.count("/") != 1):
        folder = repo.removeprefix("pack:")
        raise ValueError(
            f"{shown(repo)} is not a name on the Hugging Face Hub (ORG/NAME); to write a pack to a folder: cake-hf export "
            f"{shown_url(store)} {shown(folder)} --prompt FILE --model MODEL."
        )


def pull_command(
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="ORG/NAME or ORG/NAME@REVISION on the Hugging Face Hub, or ./FOLDER.")
    ],
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="The store to copy to: a directory (created if missing) or a URL.")
    ],
    model: Annotated[str, typer.Option(help="Refuse the pack if this model (a folder or name) cannot use it.")] = "",
    salt: Salt = "",
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
) -> None:
    """Copy a pack into a store, checking every file against the pack's manifest."""
    is_url_or_path = ":" in repo.partition("@")[0] or repo.startswith((".", "/", "~", "$"))
    if "/" not in repo and not is_url_or_path and Path(repo).is_dir():
        raise ValueError(
            f"{shown(repo)} is not a name on the Hugging Face Hub (ORG/NAME); for the folder: cake-hf pull ./{shown(repo)} "
            f"{shown_url(store)}."
        )
    source = repo if is_url_or_path else f"{SCHEME}{repo}"
    with console.status("loading the model"):
        loaded = load_model(model, dtype.value, device) if model else None
    with progress_bar("downloading", "files") as progress:
        imported = import_pack(source, store, model=loaded, salt=salt, progress=progress)
    _show_pulled(imported, store)


def _show_published(what: str, manifest: PackManifest, url: str, named: Sequence[Block]) -> None:
    """Shows what went into a pack, and what did not."""
    console.print(f"{what}ed {_summary(manifest)}")
    end_is_absent = not named[-1].fills(manifest.chunk_size) and manifest.chunks[-1].index < len(named) - 1
    missing = len(named) - end_is_absent - len(manifest.chunks)
    if missing:
        errors.print(f"Not in the store, and so not in the pack: {count_text(missing, 'chunk')}.")
    if end_is_absent:
        errors.print(
            f"The last {count_text(named[-1].tokens, 'token')}, which fill no chunk, are not in the store, and so not in the "
            "pack; `cake-hf warm --prompt` keeps them, too."
        )
    if "numerics" in manifest.facts:
        errors.print(f"It serves only the very same numerics; for other machines warm and {what} with --no-exact.")
    _show_use(url, manifest)


def _show_pulled(imported: Imported, store: str) -> None:
    there = len(imported.manifest.by_key) - imported.chunks - imported.states
    wrote = _count_text(imported.chunks, imported.states, imported.tails)
    console.print(f"pulled {_summary(imported.manifest)}")
    console.print(f"from {imported.url}", soft_wrap=True)
    console.print(f"wrote {wrote}, {bytes_text(imported.nbytes)}; {there:,} were there already")
    _show_use(shown_url(store), imported.manifest)


def _summary(manifest: PackManifest) -> str:
    first, last = manifest.tokens
    files = _count_text(len(manifest.chunks), len(manifest.states), len(manifest.tails))
    return f"{files} ({bytes_text(manifest.nbytes)}), tokens {first:,} to {last:,}, for {manifest.model}"


def _count_text(chunks: int, states: int, tails: int) -> str:
    """Describes a number of chunks of which so many are tails."""
    whole = chunks - tails
    parts = [count_text(whole, "chunk")] if whole or not tails else []
    parts += [count_text(tails, "tail")] if tails else []
    parts += [count_text(states, "snapshot")] if states else []
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _show_use(store: str, manifest: PackManifest) -> None:
    """Shows, as Python code, how to use the KV."""
    console.print(f"\n{cache_line(manifest, repr(store))}", soft_wrap=True)
    if line := prefill_line(manifest):
        console.print(line, soft_wrap=True)
