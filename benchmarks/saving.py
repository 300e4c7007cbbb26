"""What does saving cost? Compares a cold prompt whose new chunks are written behind with one that saves nothing.

Each saving run starts with an empty store of its own. The main thread only copies a chunk; hashing and writing happen in a
background thread, which on a machine with few cores still takes its time from the model. So both the time to first token and
the time of a longer generation are compared, the latter since writing goes on meanwhile. Chunks that are still unwritten when
`generate` returns are waited for outside of the timing, and reported.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.figures import Figure, Goal, Result
from benchmarks.timing import Sample, interleave
from benchmarks.workbench import Run, Workbench, remove
from cake_hf.errors import CakeError
from cake_hf.stores.local import LocalStore

OUT_OF_THE_WAY = Goal(1.03)


@dataclass(frozen=True)
class ColdRun:
    """One cold run, and how long the writer went on after it."""

    run: Run
    flush_seconds: float


def measure(bench: Workbench) -> Result:
    """Times cold runs with and without saving, interleaved."""
    bench.filled_store()  # the warm-up
    runs = interleave(
        {"save": lambda: _cold(bench, save=True), "no save": lambda: _cold(bench, save=False)}, bench.settings.repeats
    )
    first = {name: Sample(tuple(r.run.first_token_seconds for r in found)) for name, found in runs.items()}
    total = {name: Sample(tuple(r.run.seconds for r in found)) for name, found in runs.items()}
    flush = Sample(tuple(r.flush_seconds for r in runs["save"]))
    count = bench.settings.new_tokens
    return Result(
        f"Saving behind a cold prompt and {count} new tokens",
        {
            "first_token_seconds": Figure.of("first token, saving", first["save"]),
            "first_token_seconds_without": Figure.of("first token, not saving", first["no save"]),
            "first_token_ratio": Figure.ratio("first token", first["save"], first["no save"], OUT_OF_THE_WAY),
            "generate_ratio": Figure.ratio(f"{count} tokens", total["save"], total["no save"], OUT_OF_THE_WAY),
            "flush_seconds": Figure.of("until all is durable afterwards", flush),
        },
    )


def _cold(bench: Workbench, *, save: bool) -> ColdRun:
    folder = bench.fresh_folder()
    with bench.cache(LocalStore(folder, budget=None), save=save) as cache:
        run = bench.generate(cache, f"cold, save={save}", new_tokens=bench.settings.new_tokens)
        begin = time.perf_counter()
        cache.flush()
        seconds = time.perf_counter() - begin
    if run.report.chunks_saved != (bench.settings.chunks if save else 0):
        raise CakeError(f"{run.report.chunks_saved} of {bench.settings.chunks} chunks were saved with save={save}.")
    remove(folder)
    return ColdRun(run, seconds)
