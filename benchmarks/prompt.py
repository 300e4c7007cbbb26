"""What a user gains with a model of their own: one prompt computed, computed and saved, and restored from the local disk.

There are no goals here: what is good depends on model and machine. How close the library comes to what is possible is
measured with the models of `settings`.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.figures import Figure, Result
from benchmarks.timing import Sample, interleave
from benchmarks.workbench import Run, Workbench, remove
from cake_hf.stores.local import LocalStore


def measure(bench: Workbench) -> Result:
    """Times all of it, interleaved."""
    store, settings = bench.filled_store(), bench.settings
    arms: dict[str, Callable[[], Run]] = {
        "whole": lambda: bench.one_forward_run("one forward"),
        "chunks": lambda: bench.plain_run("plain, by chunks"),
        "cold": lambda: _cold(bench),
        "warm": lambda: bench.cake_run(store, "warm"),
    }
    runs = interleave(arms, settings.repeats)
    first = {name: Sample(tuple(run.first_token_seconds for run in found)) for name, found in runs.items()}
    size = sum(entry.nbytes for entry in store.entries())
    stored = Sample((size / 1e6,))
    return Result(
        f"A prompt of {settings.tokens + settings.suffix_tokens:,} tokens in chunks of {settings.chunk_size}: first token",
        {
            "one_forward_seconds": Figure.of("transformers, in one forward", first["whole"]),
            "plain_seconds": Figure.of("transformers, by chunks", first["chunks"]),
            "cold_seconds": Figure.of("cold, saving", first["cold"]),
            "warm_seconds": Figure.of("warm, from the disk", first["warm"]),
            "cold_ratio": Figure.ratio("cold over one forward", first["cold"], first["whole"]),
            "warm_ratio": Figure.ratio("warm over one forward", first["warm"], first["whole"]),
            "stored_megabytes": Figure.of("on disk", stored, "MB"),
        },
        {"bytes_per_token": size / settings.tokens},
    )


def _cold(bench: Workbench) -> Run:
    folder = bench.fresh_folder()
    with bench.cache(LocalStore(folder, budget=None), save=True) as cache:
        run = bench.generate(cache, "cold")
        cache.flush()
    remove(folder)
    return run
