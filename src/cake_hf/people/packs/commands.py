"""`cake-hf push` and `cake-hf pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cake_hf.arithmetic.outside import shown_url
from cake_hf.people.console import console, errors, progress_bar
from cake_hf.people.inspect_store import existing_store
from cake_hf.people.models import load_model, load_tokenizer, read_text
from cake_hf.people.options import ChunkSize, Device, Dtype, DtypeOption
from cake_hf.people.packs.importing import Imported, import_pack
from cake_hf.people.packs.publish import Pushed, push_pack
from cake_hf.people.units import bytes_text, count_text
from cake_hf.stores.hub import SCHEME
from cake_hf.stores.manifest import PackManifest

Salt = Annotated[str, typer.Option(help="That the KV was saved under.")]


def push_command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="The store that was warmed with the prompt.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="ORG/NAME on the Hugging Face Hub; made when missing.")],
    prompt: Annotated[Path, typer.Option(help="The text file whose KV is to be published.")],
    model: Annotated[str, typer.Option(help="A model's folder, or its name on the Hugging Face Hub.")],
    chunk_size: ChunkSize = None,
    salt: Salt = "",
    allow_salted: Annotated[bool, typer.Option("--allow-salted", help="Give away KV saved under a salt.")] = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    exact: Annotated[bool, typer.Option(help="As it was warmed; only --no-exact serves other machines.")] = True,
    tokens: Annotated[int | None, typer.Option(min=1, help="Take only so many tokens from the start.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Publish a prompt's KV on the Hugging Face Hub, from where anybody's CakeCache can load it."""
    text = read_text(prompt)
    with existing_store(store) as opened:
        with console.status("loading the model"):
            tokenizer, loaded = load_tokenizer(model), load_model(model, dtype.value, device)
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]
        with progress_bar("uploading", "files") as progress:
            pushed = push_pack(
                opened,
                repo,
                loaded,
                ids,
                chunk_size=chunk_size or "auto",
                salt=salt,
                exact=exact,
                allow_salted=allow_salted,
                private=private or None,
                progress=progress,
            )
    _show_pushed(pushed)


def pull_command(
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="ORG/NAME or ORG/NAME@REVISION on the Hugging Face Hub, or ./FOLDER.")
    ],
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="Where it goes: a directory (made when missing) or a URL.")
    ],
    model: Annotated[str, typer.Option(help="Refuse the pack if it is of no use to this model (folder or name).")] = "",
    salt: Salt = "",
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
) -> None:
    """Copy a pack into a store, every file checked against the pack's manifest."""
    is_url_or_path = ":" in repo.partition("@")[0] or repo.startswith((".", "/", "~", "$"))
    source = repo if is_url_or_path else f"{SCHEME}{repo}"
    with console.status("loading the model"):
        loaded = load_model(model, dtype.value, device) if model else None
    with progress_bar("downloading", "files") as progress:
        imported = import_pack(source, store, model=loaded, salt=salt, progress=progress)
    _show_pulled(imported, store)


def _show_pushed(pushed: Pushed) -> None:
    console.print(f"pushed {_summary(pushed.manifest)}")
    if pushed.missing:
        errors.print(f"Not in the store, and so not in the pack: {count_text(pushed.missing, 'chunk')}.")
    if "numerics" in pushed.manifest.facts:
        errors.print("It serves only the very same numerics; for other machines warm and push with --no-exact.")
    console.print(f"\ncache = CakeCache(model, {_arguments(pushed.url, pushed.manifest)})", soft_wrap=True)


def _show_pulled(imported: Imported, store: str) -> None:
    there = len(imported.manifest.by_key) - imported.chunks - imported.states
    wrote = _count_text(imported.chunks, imported.states)
    console.print(f"pulled {_summary(imported.manifest)}")
    console.print(f"from {imported.url}", soft_wrap=True)
    console.print(f"wrote {wrote}, {bytes_text(imported.nbytes)}; {there:,} were there already")
    console.print(f"\ncache = CakeCache(model, {_arguments(shown_url(store), imported.manifest)})", soft_wrap=True)


def _summary(manifest: PackManifest) -> str:
    (first, last), files = manifest.tokens, _count_text(len(manifest.chunks), len(manifest.states))
    return f"{files} ({bytes_text(manifest.nbytes)}), tokens {first:,} to {last:,}, for {manifest.model}"


def _count_text(chunks: int, states: int) -> str:
    return count_text(chunks, "chunk") + (f" and {count_text(states, 'snapshot')}" if states else "")


def _arguments(store: str, manifest: PackManifest) -> str:
    options = [repr(store)]
    options += [f"chunk_size={manifest.chunk_size}"]
    options += [] if "numerics" in manifest.facts else ["exact=False"]
    options += ["salt=..."] if manifest.salted else []
    return ", ".join(options)
