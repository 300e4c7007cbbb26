"""`python -m benchmarks.codec.target --model NAME`: the first token over `max_ttft`, when a line has become slower.

The store is memory behind a line of a fixed bandwidth. After restores at that bandwidth, the line keeps only a part of it, and
the next prompt is restored within a target: once with `max_ttft`, and once without.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer

from benchmarks.codec.restore import model_and_prompt
from benchmarks.machine import Machine
from cake_hf import CakeCache, MemoryStore
from cake_hf.cli.console import console
from cake_hf.cli.sheets import Sheet
from cake_hf.testing import ThrottledStore

LEFT = (1.0, 0.7, 0.5)
"""Parts of the bandwidth that are left."""

TARGET = 1.1
"""`max_ttft` over the seconds of a restore while the line is as fast as ever."""

TAUGHT = 2
"""Restores before the line changes."""


class Restored(NamedTuple):
    """One restore: seconds, and the share of its tokens of which only the bases came."""

    seconds: float
    rounded: float


def restored(
    model: Any, ids: torch.Tensor, store: ThrottledStore, strategy: str, max_ttft: float | None, chunk_size: int
) -> Restored:
    """Restores the prompt, and saves nothing."""
    options: dict[str, Any] = {"strategy": strategy, "codec": "lossless", "exact": False, "max_ttft": max_ttft}
    with CakeCache(model, store, chunk_size=chunk_size, save=False, **options) as cache:
        begin = time.perf_counter()
        report = cache.prefill(ids, whole=True)
        return Restored(time.perf_counter() - begin, report.tokens_hurried / report.tokens)


def measured(
    run: Callable[[ThrottledStore, float | None], Restored],
    line: Callable[[], ThrottledStore],
    left: float,
    rounds: int,
) -> dict[str, float]:
    """Returns seconds over target with and without `max_ttft`, medians, when a line keeps that part of its bandwidth."""
    found: dict[bool, list[Restored]] = {True: [], False: []}
    for _ in range(rounds):
        for has_target, results in found.items():
            store = line()
            target = TARGET * [run(store, None).seconds for _ in range(TAUGHT)][-1]
            store.bytes_per_second *= left
            took = run(store, target if has_target else None)
            results.append(Restored(took.seconds / target, took.rounded))
    over = {has_target: [one.seconds for one in results] for has_target, results in found.items()}
    return {
        "left": left,
        "without": median(over[False]),
        "with": median(over[True]),
        "worst": max(over[True]),
        "rounded": median(one.rounded for one in found[True]),
    }


def main(
    model: Annotated[str, typer.Option(help="Folder or name of a model.")],
    tokens: int = 1024,
    chunk_size: int = 64,
    strategy: str = "load",
    line_seconds: Annotated[float, typer.Option(help="Seconds in which the line brings all chunks at first.")] = 2.0,
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """Measures restores with and without a target, behind a line that keeps a part of its bandwidth."""
    machine = Machine()
    loaded, ids = model_and_prompt(model, tokens)
    kept = MemoryStore()
    with CakeCache(loaded, kept, chunk_size=chunk_size, codec="lossless", exact=False) as cache:
        cache.prefill(ids, whole=True)
        cache.flush()
        rate = cache.report.bytes_stored / line_seconds

    def run(store: ThrottledStore, max_ttft: float | None) -> Restored:
        return restored(loaded, ids, store, strategy, max_ttft, chunk_size)

    rows = [measured(run, lambda: ThrottledStore(kept, rate), left, rounds) for left in LEFT]
    cells = [
        [f"{row['left']:g}", *(f"{row[name]:.2f}" for name in ("without", "with", "worst")), f"{row['rounded']:.0%}"]
        for row in rows
    ]
    headings = ("<bandwidth left", "without", "with max_ttft", "worst", "as near")
    console.print(Sheet(f"TTFT over target, strategy {strategy!r}, medians of {rounds}", headings, cells))
    if out is not None:
        told = {"machine": machine.as_dict(), "model": Path(model).name, "tokens": tokens, "chunk_size": chunk_size}
        plain = {**told, "strategy": strategy, "line_seconds": line_seconds, "rounds": rounds, "rows": rows}
        out.write_text(json.dumps(plain) + "\n")


if __name__ == "__main__":
    typer.run(main)
