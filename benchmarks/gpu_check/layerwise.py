"""What layer-wise arrival is worth: the last piece runs through a layer as soon as that layer of the last loads is there.

Without it the last chunks are read whole, and the last piece waits for all of them. Everything else is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.cells import ttft
from benchmarks.figures import Figure
from benchmarks.gpu_check.desk import Desk
from benchmarks.gpu_check.outcome import Plain
from benchmarks.grid.axes import BITS_PER_BYTE, GIGA
from benchmarks.timing import interleave
from benchmarks.workbench import Run, Workbench
from cake_hf.stores.base import Store
from cake_hf.testing import Rules, ThrottledStore, WrapperStore

GBPS = 32
STRATEGIES = ("load", "both")


def run(desk: Desk) -> None:
    """Time both, interleaved, from the disk and from a throttled one."""
    bench = desk.bench(desk.sizes.middle, suffix_tokens=desk.sizes.suffix)
    disk = bench.filled_store()
    rate = GBPS * GIGA / BITS_PER_BYTE
    sources: dict[str, Callable[[], Store]] = {
        "disk": lambda: WrapperStore(disk),
        f"{GBPS} Gbps": lambda: ThrottledStore(disk, rate),
    }
    arms: dict[str, Callable[[], Run]] = {}
    for source, opened in sources.items():
        for strategy in STRATEGIES:
            # A store object of its own for each, since what is learnt about its costs is remembered with it.
            arms[f"with, {source}, {strategy}"] = partial(_with, bench, opened(), strategy)
            arms[f"without, {source}, {strategy}"] = partial(_without, bench, opened(), strategy)
    runs = interleave(arms, bench.settings.repeats)
    figures: Plain = {}
    for source in sources:
        for strategy in STRATEGIES:
            having, lacking = (runs[f"{how}, {source}, {strategy}"] for how in ("with", "without"))
            name = f"{strategy}, {source}"
            figures[f"{name}, with"] = Figure.of(f"{name}, layer by layer", ttft(having)).as_dict()
            figures[f"{name}, ratio"] = Figure.ratio(f"{name}, over whole", ttft(having), ttft(lacking)).as_dict()
    gated = sum(_was_gated(run) for name, found in runs.items() if name.startswith("with,") for run in found)
    desk.keep({"figures": figures, "suffixes_run_layer_by_layer": gated, "parity": bench.parity.as_dict()})


def _with(bench: Workbench, store: Store, strategy: str) -> Run:
    return bench.cake_run(store, f"layer-wise, {strategy}", strategy=strategy)


def _without(bench: Workbench, store: Store, strategy: str) -> Run:
    return bench.cake_run(store, f"whole, {strategy}", strategy=strategy, rules=Rules(ranges=lambda *_: 1))


def _was_gated(run: Run) -> bool:
    return any(span.outcome == "gated" for span in run.report.timeline if span.chunk < 0)
