"""The paper's cells: lengths x stores; compute-only, load-only and both ends in interleaved rounds (see `grid`)."""

from __future__ import annotations

from benchmarks.gpu_check.desk import Desk
from benchmarks.gpu_check.outcome import Plain
from benchmarks.grid.axes import Axes
from benchmarks.grid.run import Grid
from benchmarks.grid.run import run as run_grid

SPARE_SECONDS = 15.0
"""What the grid leaves of the stage's time: the last group may take somewhat longer than expected, and then it cleans up."""


def run(desk: Desk) -> None:
    """Measure the grid; what it has by then is kept after each length, the longest first."""
    sizes = desk.sizes
    axes = Axes(
        shapes=(sizes.shape,),
        tokens=sizes.lengths,
        shares=(1.0,),
        sources=sizes.stores(),
        repeats=sizes.repeats,
        chunk_size=sizes.chunk_size,
        dtype=sizes.dtype,
        device=sizes.device,
        peers=False,
        parity=sizes.exactness,
        minutes=max(1.0, desk.left - SPARE_SECONDS) / 60,
        throttled="memory",
    )
    run_grid(axes, desk.folder, lambda step: print(step, flush=True), lambda grid: desk.keep(_kept(grid)))


def _kept(grid: Grid) -> Plain:
    """The grid so far; what could not be measured, or was wrong, makes the stage a failure."""
    return {"grid": grid.as_dict(), "failure": "; ".join(grid.faults)}
