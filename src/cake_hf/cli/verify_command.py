"""The options of `cake-hf verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cake_hf.cli.console import STOPPED, WRONG, progress_bar
from cake_hf.cli.inspect_store import existing_store
from cake_hf.cli.options import StoreArgument, WarmedOptions, flat_options
from cake_hf.cli.recompute import RecomputeJob, recompute, show_recomputed
from cake_hf.cli.verify import BadChunk, delete, show_stopped, show_verified, verify
from cake_hf.util.sizes import parse_share


@flat_options
def verify_command(
    store: StoreArgument,
    fix: Annotated[bool, typer.Option("--fix", "--delete", help="Delete the damaged chunks.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also decode encoded chunks, and compare what comes out.")
    ] = False,
    share: Annotated[
        str,
        typer.Option(
            "--recompute",
            metavar="SHARE",
            help="Also compute a share of the prompts' chunks again, e.g. 5%, and compare every bit; needs --model, --prompt.",
        ),
    ] = "",
    model: Annotated[str, typer.Option(help="The model that the chunks are said to come from.")] = "",
    prompt: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text file whose chunks are sampled; may be given several times. Only texts that you have can be checked."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample: the same store and seed give the same one.")] = 0,
    *,
    warmed: WarmedOptions,
) -> None:
    """Check every chunk against its checksum; exit code 1 if a damaged one is left.

    A checksum finds accidents, not lies: a forged chunk can be
    well-formed. Only computing it again tells. A store does not have the texts
    of its prompts, so --recompute needs them: each is computed from its start
    to its last sampled chunk, without using anything that is stored. Give the
    options that they were warmed with; chunks of other machines (--no-exact)
    may differ.

    Other users of the store do not wait for this. Ctrl-C ends it and shows the
    findings so far.
    """
    job = _recompute_job(share, model, prompt or [], seed, warmed)
    with existing_store(store) as opened:
        with progress_bar("checking", "chunks") as progress:
            result = verify(opened, progress, deep=deep)
        if result.stopped:
            show_stopped(result)
            raise typer.Exit(STOPPED)
        recomputed = recompute(job, opened) if job else None
        bad = _together(result.bad, recomputed.bad if recomputed else [])
        deleted = delete(opened, bad) if fix else 0
    show_verified(result, bad, deleted)
    if recomputed:
        show_recomputed(recomputed)
    if deleted < len(bad):
        raise typer.Exit(WRONG)


def _recompute_job(
    share: str, model: str, prompts: list[Path], seed: int, warmed: WarmedOptions
) -> RecomputeJob | None:
    if not share:
        if model or prompts:
            raise ValueError("--model and --prompt are for --recompute; add for instance --recompute 5%.")
        return None
    if not model or not prompts:
        raise ValueError(
            "--recompute needs --model, and with --prompt the texts whose chunks are to be checked: chunks do not hold them."
        )
    return RecomputeJob(model, prompts, parse_share(share), warmed, seed)


def _together(one: list[BadChunk], other: list[BadChunk]) -> list[BadChunk]:
    """Merges the findings: a chunk that both checks have found counts once, with the first one's words."""
    return list({chunk.key: chunk for chunk in [*other, *one]}.values())
