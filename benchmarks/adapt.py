"""`python -m benchmarks adapt`: how soon a cache follows a change of the machine or the store.

Each case compares, prompt by prompt and in turns, a cache that has seen the change with one that has only known the
conditions after it. Each has its own directory with the same chunks. The JSON has what both believe and measure, chunk by
chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.adapt_trace import Prompted, Watched, computed, copy_of, in_turns, seconds
from benchmarks.cells import calibrate
from benchmarks.figures import Figure, Goal, Result
from benchmarks.grid.competition import Competition
from benchmarks.measuring import hand_out, measure_all, progress
from benchmarks.settings import SHAPES, Dtype, choose
from benchmarks.workbench import Workbench
from cake_hf.cli.models import find_device
from cake_hf.errors import CakeError
from cake_hf.limits import MIN_CHUNK_SIZE
from cake_hf.plots import require_matplotlib
from cake_hf.transfer.cost_notes import NOTE_SECONDS, flush_notes

ADAPT_HELP = (
    "Measure how soon a cache follows a change: a competing load that has ended, for the same store object and for a "
    "new one that reads the notes; a bandwidth that falls to a tenth, and recovers.\n\n"
    "Times are relative to those of a cache that only knows the new conditions, in turns; 1.05 is the goal. The model has "
    "random weights. Goals never decide the exit code; it is 1 only if a restored prompt gave other logits than a computed "
    "one, or something could not be measured."
)

FORGOTTEN = Goal(1.05)
"""The goal for prompts by which the old conditions should be forgotten."""

LEARNING, LOADED, QUIET, SLOW, FAST = "learning", "beside a load", "quiet", "slow", "fast"


@dataclass(frozen=True)
class Course:
    """How many prompts each part of a case takes, and how much changes.

    Attributes:
        learning: before anything is compared.
        loaded: beside the competing load; they are the first prompts ever of that cache.
        quiet: after the load.
        changed: after each change of the bandwidth.
        share: of the processors that the load leaves.
        beside: load-only over compute-only, in the case of the load.
        fast: the same while the bandwidth is high.
        fall: the factor by which the bandwidth falls.
    """

    learning: int = 4
    loaded: int = 4
    quiet: int = 10
    changed: int = 5
    share: float = 0.2
    beside: float = 0.7
    fast: float = 0.3
    fall: float = 10.0


QUICK = Course(learning=2, loaded=2, quiet=4, changed=4, share=0.5)


@dataclass
class _Pairs:
    """The prompts, in all turns, of a cache that has seen the change and of one that has not."""

    changed: list[list[Prompted]] = field(default_factory=list)
    known: list[list[Prompted]] = field(default_factory=list)

    def add(self, changed: list[Prompted], known: list[Prompted]) -> None:
        """Adds the prompts of one turn."""
        self.changed.append(changed)
        self.known.append(known)

    def figures(self, name: str, words: str, judged: Sequence[slice]) -> dict[str, Figure]:
        """Returns the first prompt's ratio, the second's, that of the later ones, and how many chunks were computed in these.

        Args:
            name: prefix of the figures' names.
            words: prefix of the labels.
            judged: the figures with a goal.
        """
        last = len(self.changed[0])
        parts = {"first": (_FIRST, "prompt 1"), "second": (_SECOND, "prompt 2"), "later": (_LATER, f"prompts 3-{last}")}
        figures = {
            f"{name}_{key}": Figure.ratio(
                f"{words}, {label}",
                seconds(_of(self.changed, part)),
                seconds(_of(self.known, part)),
                FORGOTTEN if part in judged else None,
            )
            for key, (part, label) in parts.items()
        }
        for key, turns, label in (
            ("computed", self.changed, "chunks computed"),
            ("computed_by_other", self.known, "the other's chunks"),
        ):
            figures[f"{name}_{key}"] = Figure.of(f"{words}, {label}", computed(_of(turns, _LATER)), "chunks")
        return figures

    def counts(self) -> dict[str, list[list[int]]]:
        """Returns the chunks computed in each prompt of each turn."""
        return {"changed": _counts(self.changed), "known": _counts(self.known)}


_FIRST, _SECOND, _LATER = slice(0, 1), slice(1, 2), slice(2, None)


def after_load(bench: Workbench, course: Course) -> Result:
    """Measures a cache whose first prompts ever run beside a competing load, and later ones on the quiet machine."""
    rate = calibrate(bench, [course.beside])[course.beside]
    trace: list[Prompted] = []
    kept, noted, beside = _Pairs(), _Pairs(), []
    make = partial(_watched, bench, rate, trace)
    with Competition(course.share, bench.settings.device) as load, make("quiet only") as quiet:
        quiet.prompts(LEARNING, course.learning)
        for turn in range(bench.settings.repeats):
            with ExitStack() as stack:
                cache = stack.enter_context(make("kept", turn=turn))
                with load.working():
                    beside.append(cache.prompts(LOADED, course.loaded))
                if not flush_notes(NOTE_SECONDS):
                    raise CakeError("The learned costs could not be written in time.")
                note = stack.enter_context(make("note", like=cache.folder, turn=turn))
                arms = {"kept": cache, "note": note, "quiet": quiet}
                found = in_turns({name: partial(one.prompt, QUIET) for name, one in arms.items()}, course.quiet)
            kept.add(found["kept"], found["quiet"])
            noted.add(found["note"], found["quiet"])
    figures = kept.figures("kept", "same store", [_LATER]) | noted.figures("note", "from the note", [_LATER])
    details = {
        "bytes_per_second": rate,
        "chunks_computed": {"beside": _counts(beside), "kept": kept.counts(), "note": noted.counts()},
        "trace": [prompted.as_dict() for prompted in trace],
    }
    return Result("After a passing load, over a cache that never saw it", figures, details)


def after_fall(bench: Workbench, course: Course) -> Result:
    """Measures a cache whose store becomes slow, and fast again."""
    high = calibrate(bench, [course.fast])[course.fast]
    low = high / course.fall
    trace: list[Prompted] = []
    fallen, back = _Pairs(), _Pairs()
    make = partial(_watched, bench, trace=trace)
    with make(low, name="slow only") as slow, make(high, name="fast only") as fast:
        for known in (slow, fast):
            known.prompts(LEARNING, course.learning)
        for turn in range(bench.settings.repeats):
            with make(high, name="changing", turn=turn) as changing:
                changing.prompts(LEARNING, course.learning)
                for rate, phase, known, pairs in ((low, SLOW, slow, fallen), (high, FAST, fast, back)):
                    changing.store.bytes_per_second = rate
                    arms = {"changed": partial(changing.prompt, phase), "known": partial(known.prompt, phase)}
                    found = in_turns(arms, course.changed)
                    pairs.add(found["changed"], found["known"])
    judged = [_SECOND, _LATER]
    figures = fallen.figures("fallen", "slower", judged) | back.figures("back", "fast again", judged)
    details = {
        "bytes_per_second": {"high": high, "low": low},
        "chunks_computed": {"fallen": fallen.counts(), "back": back.counts()},
        "trace": [prompted.as_dict() for prompted in trace],
    }
    title = f"Bandwidth falls {course.fall:g} times, over a cache that knew no other"
    return Result(title, figures, details)


Case = Callable[[Workbench, Course], Result]

MEASUREMENTS: dict[str, Case] = {"load": after_load, "bandwidth": after_fall}


def adapt_command(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Run only this case: {', '.join(MEASUREMENTS)}. May be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the line of JSON.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use a tiny model and few prompts, only to see that it runs.")
    ] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Number of turns, in each of which everything changes once; 3.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the cached prefix; 4096, or 512 with --quick.")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=MIN_CHUNK_SIZE, help="Tokens per chunk; 512, or 64 with --quick.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the weights, and so of the KV.")] = Dtype.FLOAT32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto is the GPU if there is one.")] = "auto",
    shape: Annotated[
        str | None, typer.Option(help=f"{', '.join(SHAPES)}; small, or 1b on a GPU, or tiny with --quick.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Make the (temporary) directories in this one.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the trace of beliefs to this PNG (needs matplotlib).")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Measure how soon a cache follows a change; see ADAPT_HELP."""
    if plot is not None:
        require_matplotlib()
    if unknown := sorted(set(only or ()) - set(MEASUREMENTS)):
        raise ValueError(f"There is no case {unknown[0]!r}; choose from {', '.join(MEASUREMENTS)}.")
    settings = choose(
        quick=quick,
        repeats=repeats or (1 if quick else 3),
        tokens=tokens or (None if quick else 4096),
        chunk_size=chunk_size,
        dtype=dtype.value,
        device=str(find_device(device)),
        shape=shape,
    )
    course = QUICK if quick else Course()
    cases = {name: _along(case, course) for name, case in MEASUREMENTS.items() if not only or name in only}
    outcome, results = measure_all(settings, folder, progress(as_json), cases)
    outcome |= {"course": asdict(course)}
    if plot is not None:
        from benchmarks.adapt_plot import draw

        draw(outcome, plot)
    hand_out(outcome, results, as_json=as_json, out=out)


def _along(case: Case, course: Course) -> Callable[[Workbench], Result]:
    return lambda bench: case(bench, course)


def _watched(
    bench: Workbench, rate: float, trace: list[Prompted], name: str, *, like: Path | None = None, turn: int = 0
) -> Watched:
    """Returns a cache that has learned nothing or, with `like`, one that knows the notes of another directory."""
    folder = copy_of(like or bench.filled_store().root, bench, notes=like is not None)
    return Watched(bench, name, folder, rate, trace, turn)


def _of(turns: Sequence[Sequence[Prompted]], part: slice) -> list[Prompted]:
    return [prompted for prompts in turns for prompted in prompts[part]]


def _counts(turns: Sequence[Sequence[Prompted]]) -> list[list[int]]:
    return [[prompted.computed for prompted in prompts] for prompts in turns]
