"""`cake-hf warm`: puts the KV of documents into a store: of one, or of several files and the text files of folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer

from cake_hf.cli.console import console, errors
from cake_hf.cli.keeping import said_of_new
from cake_hf.cli.models import HELP as MODEL
from cake_hf.cli.models import read_text
from cake_hf.cli.options import Boundaries, Chat, ChunkSize, Codec, CodecOption, Device, Dtype, DtypeOption, System
from cake_hf.cli.sheets import Sheet
from cake_hf.cli.warm import Loaded, WarmJob, load, show_warmed, stored_tokens, warm
from cake_hf.errors import CakeError
from cake_hf.report import Report
from cake_hf.util.environment import STORE
from cake_hf.util.redaction import shown, shown_url
from cake_hf.util.sizes import bytes_text, count_text


@dataclass
class Warmed:
    """The result for several documents.

    Attributes:
        reports: the reports of the stored documents.
        left_out: why others are not stored.
    """

    reports: dict[Path, Report] = field(default_factory=dict)
    left_out: dict[Path, str] = field(default_factory=dict)


def documents_in(paths: Sequence[Path]) -> list[Path]:
    """Returns the files as given, and for folders the files in them, at any depth, sorted by name.

    Hidden files and links in a folder are skipped.

    Raises:
        ValueError: there is no file in a folder.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inner = [file for file in sorted(path.rglob("*")) if _is_document(file, path)]
        if not inner:
            raise ValueError(f"There is no file in the folder {path}; give a text file, or a folder with some.")
        found += inner
    return list(dict.fromkeys(found))


def warm_many(job: WarmJob, files: Sequence[Path], given: Sequence[Path], loaded: Loaded) -> Warmed:
    """Warms one document after the other; a file from a folder that cannot be warmed is left out.

    Args:
        job: whose file is replaced.
        files: to warm.
        given: those of the files that the user named.
        loaded: the job's model.

    Raises:
        CakeError: none of them, or one that the user named, could not be stored.
        ValueError: a file that the user named cannot be read, or is too long.
    """
    warmed = Warmed()
    for number, file in enumerate(files, start=1):
        console.print(f"{number} of {len(files)}: {shown(str(file))}", style="dim", soft_wrap=True)
        try:
            read_text(file)
            warmed.reports[file] = warm(replace(job, file=file), loaded)
        except (CakeError, ValueError) as error:
            if file in given:
                raise
            warmed.left_out[file] = shown(error)
    if not warmed.reports:
        raise CakeError(f"None of {count_text(len(files), 'file')} was warmed. {next(iter(warmed.left_out.values()))}")
    return warmed


def show_many(job: WarmJob, warmed: Warmed) -> None:
    """Shows the result for each document, and which prompts find it."""
    rows = []
    for file, report in warmed.reports.items():
        chunks = report.chunks_computed + report.chunks_loaded
        new = f"{report.chunks_saved:,}"
        stored = f"{stored_tokens(job, report):,}"
        rows.append(
            [shown(str(file)), f"{report.tokens:,}", stored, f"{chunks:,}", new, bytes_text(report.bytes_saved)]
        )
    console.print(Sheet("warmed", ("<file", "tokens", "stored", "chunks", "new", "bytes"), rows))
    for file, why in warmed.left_out.items():
        errors.print(f"left out: {shown(str(file))}: {why}")
    console.print(
        "Every prompt that begins with the stored tokens of one of these, in any process, restores them; "
        f"cake-hf ls {shown_url(job.store)} lists them."
    )


def _is_document(file: Path, root: Path) -> bool:
    parts = file.relative_to(root).parts
    return file.is_file() and not file.is_symlink() and not any(part.startswith(".") for part in parts)


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
