"""`cake-hf export`, `cake-hf push` and `cake-hf pull`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cake_hf.arithmetic.outside import shown, shown_url
from cake_hf.arithmetic.sizes import bytes_text, count_text
from cake_hf.cli.console import console, errors, progress_bar
from cake_hf.cli.inspect_store import existing_store
from cake_hf.cli.models import HELP as MODEL
from cake_hf.cli.models import load_model, load_tokenizer, read_text
from cake_hf.cli.options import ChunkSize, Device, Dtype, DtypeOption
from cake_hf.packs.export import export_pack
from cake_hf.packs.importing import Imported, import_pack
from cake_hf.packs.publish import push_pack
from cake_hf.stores import Store
from cake_hf.stores.hub import SCHEME
from cake_hf.stores.manifest import PackManifest

Salt = Annotated[str, typer.Option(help="That the KV was saved under.")]


PromptFile = Annotated[Path, typer.Option("--prompt", help="The text file whose KV it is.")]
ModelOption = Annotated[str, typer.Option("--model", help=MODEL)]
AllowSalted = Annotated[bool, typer.Option("--allow-salted", help="Give away KV saved under a salt.")]
Exact = Annotated[bool, typer.Option(help="As it was warmed; only --no-exact serves other machines.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Take only so many tokens from the start.")]
AboutPrompt = Annotated[
    str, typer.Option("--about", metavar="TEXT", help="What the prompt is, for the card; by default the file's name.")
]
BaseModel = Annotated[
    str, typer.Option(metavar="ORG/NAME", help="The model's name on the Hub, for the card, if --model is a folder.")
]


def export_command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="The store that was warmed with the prompt.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New, empty, or an older pack, which is replaced.")],
    prompt: PromptFile,
    model: ModelOption,
    chunk_size: ChunkSize = None,
    salt: Salt = "",
    allow_salted: AllowSalted = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    exact: Exact = True,
    tokens: Tokens = None,
    about: AboutPrompt = "",
    base_model: BaseModel = "",
) -> None:
    """Write a prompt's KV to a folder, as a pack to be copied or put on a share; `pack:FOLDER` opens it."""
    with (
        _prompt_of(store, prompt, model, dtype.value, device, tokens) as (opened, loaded, ids),
        progress_bar("writing", "files") as progress,
    ):
        manifest = export_pack(
            opened,
            folder,
            loaded,
            ids,
            chunk_size=chunk_size or "auto",
            salt=salt,
            exact=exact,
            allow_salted=allow_salted,
            about=about or f"the text file {prompt.name}",
            base_model=base_model,
            progress=progress,
        )
    missing = ids.shape[1] // manifest.chunk_size - len(manifest.chunks)
    _show_published("export", manifest, f"pack:{shown(str(folder))}", missing)


def push_command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="The store that was warmed with the prompt.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="ORG/NAME on the Hugging Face Hub; made when missing.")],
    prompt: PromptFile,
    model: ModelOption,
    chunk_size: ChunkSize = None,
    salt: Salt = "",
    allow_salted: AllowSalted = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: Device = "auto",
    exact: Exact = True,
    tokens: Tokens = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    about: AboutPrompt = "",
    base_model: BaseModel = "",
) -> None:
    """Publish a prompt's KV on the Hugging Face Hub, from where anybody's CakeCache can load it."""
    _refuse_folder(store, repo)
    with (
        _prompt_of(store, prompt, model, dtype.value, device, tokens) as (opened, loaded, ids),
        progress_bar("uploading", "files") as progress,
    ):
        pushed = push_pack(
            opened,
            repo,
            loaded,
            ids,
            chunk_size=chunk_size or "auto",
            salt=salt,
            exact=exact,
            allow_salted=allow_salted,
            about=about or f"the text file {prompt.name}",
            base_model=base_model,
            private=private or None,
            progress=progress,
        )
    _show_published("push", pushed.manifest, pushed.url, pushed.missing)


@contextmanager
def _prompt_of(
    store: str, prompt: Path, model: str, dtype: str, device: str, tokens: int | None
) -> Iterator[tuple[Store, Any, Any]]:
    """The opened store, the loaded model, and the prompt's `[1, tokens]`."""
    text = read_text(prompt)
    with existing_store(store) as opened:
        with console.status("loading the model"):
            tokenizer, loaded = load_tokenizer(model), load_model(model, dtype, device)
        yield opened, loaded, tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]


def _refuse_folder(store: str, repo: str) -> None:
    """A folder is no repository, and a name of one folder in another looks like one.

    Raises:
        ValueError: it is a folder, or looks like a path.
    """
    is_path = repo.startswith((".", "/", "~", "$", "pack:", "file:")) or "\\" in repo or Path(repo).is_dir()
    if is_path or ("://" not in repo and repo.count("/") != 1):
        folder = repo.removeprefix("pack:")
        raise ValueError(
            f"{shown(repo)} is no ORG/NAME on the Hugging Face Hub; to write a pack to a folder: cake-hf export "
            f"{shown_url(store)} {shown(folder)} --prompt FILE --model MODEL."
        )


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


def _show_published(what: str, manifest: PackManifest, url: str, missing: int) -> None:
    console.print(f"{what}ed {_summary(manifest)}")
    if missing:
        errors.print(f"Not in the store, and so not in the pack: {count_text(missing, 'chunk')}.")
    if "numerics" in manifest.facts:
        errors.print(f"It serves only the very same numerics; for other machines warm and {what} with --no-exact.")
    console.print(f"\ncache = CakeCache(model, {_arguments(url, manifest)})", soft_wrap=True)


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
