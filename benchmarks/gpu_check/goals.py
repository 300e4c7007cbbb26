"""What the check should reach, and what its results came to. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_check.paper import AVERAGE

Plain = dict[str, Any]

ETA, RATIO, SPEED, DECODING, OVER_PLAIN, SAVING = 0.95, 1.02, 0.9, 0.9, 1.03, 1.03
USUAL_THREADS = 2
"""Loader threads of a cache, unless told otherwise."""
REACHED = 0.9
"""A throttle counts as reached if load-only runs came to so much of it. Otherwise it is the throttle's Python, sleeps and store
that are measured, and T* is that of the rate that was reached."""


@dataclass(frozen=True)
class Reached:
    """One goal.

    Attributes:
        what: is judged.
        goal: as text.
        value: as text; empty if it was not measured.
        met: None if it was not measured.
    """

    what: str
    goal: str
    value: str = ""
    met: bool | None = None


def goals(result: Plain) -> list[Reached]:
    """All goals, with what a result came to."""
    groups = result_of(result, "ttft").get("grid", {}).get("groups", [])
    cells = [(group, cell) for group in groups for cell in group["cells"]]
    return [
        _parity(result),
        _attention(result_of(result, "attention")),
        _each("eta, cells where both ends help", [eta(cell) for _, cell in cells if cell["eta"]["goal"]], ETA, False),
        _each("both ends over the better one, all cells", [cell["ratio"]["value"] for _, cell in cells], RATIO, True),
        _average([factor for group, cell in cells if cell["throttled"] for factor in speed_ups(group, cell)]),
        _each("compute-only over plain chunked", _values(groups, "compute_over_plain"), OVER_PLAIN, True),
        _one(
            "loads over the slower of disk and copy", _figure(result, "loading", f"speed_{USUAL_THREADS}"), SPEED, False
        ),
        _one("a decoded token over `DynamicCache`", _figure(result, "decoding", "ratio"), DECODING, True),
        _one("first token, saving over not saving", _figure(result, "saving", "first_token_ratio"), SAVING, True),
    ]


def result_of(result: Plain, stage: str) -> Plain:
    """What a stage came to; empty if it did not run."""
    found: Plain = result.get("stages", {}).get(stage, {}).get("result", {})
    return found


def reached(cell: Plain) -> bool:
    """Whether the cell's loads came as fast as its throttle allows."""
    return not cell["throttled"] or cell["reached_gbps"] >= REACHED * cell["gbps"]


def eta(cell: Plain) -> float:
    """T* over both ends, for the rate that there was."""
    return float(cell["eta"]["value"] if reached(cell) else cell["eta_as_reached"])


def speed_ups(group: Plain, cell: Plain) -> tuple[float, float]:
    """How many times as fast as load-only and as compute-only both ends were."""
    both = cell["both_seconds"]["value"]
    return cell["load_seconds"]["value"] / both, group["compute_seconds"]["value"] / both


def mismatches(part: Any) -> Iterator[str]:
    """All that differed in bits, wherever in a result it is written down."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name in ("mismatches", "wrong") and isinstance(value, list):
                yield from map(str, value)
            elif name != "models":  # of `parity`, summed up beside it
                yield from mismatches(value)
    elif isinstance(part, list):
        for value in part:
            yield from mismatches(value)


def checks(part: Any) -> int:
    """How many comparisons of bits there are in a result."""
    if isinstance(part, dict):
        own = sum(value for name, value in part.items() if name in ("checks", "runs") and isinstance(value, int))
        return own + sum(checks(value) for name, value in part.items() if name != "models")
    return sum(map(checks, part)) if isinstance(part, list) else 0


def _parity(result: Plain) -> Reached:
    stages = [stage.get("result", {}) for stage in result.get("stages", {}).values()]
    tried, wrong = sum(map(checks, stages)), sum(len(list(mismatches(stage))) for stage in stages)
    what, goal = "restored prompts bit for bit as computed", "all"
    return Reached(what, goal, f"{tried - wrong} of {tried}", not wrong) if tried else Reached(what, goal)


def _attention(found: Plain) -> Reached:
    what, goal = "the first attention's bits as in a chunked `DynamicCache`", "equal"
    if "equal" not in found:
        return Reached(what, goal)
    names = ", ".join(found["equal_with"]) or "no setting"
    return Reached(what, goal, "equal" if found["equal"] else f"not equal; equal with {names}", found["equal"])


def _average(found: list[float]) -> Reached:
    what, goal = "mean speed-up over load-only and over compute-only, throttled cells", f"> {AVERAGE}"
    if not found:
        return Reached(what, goal)
    mean = sum(found) / len(found)
    return Reached(what, goal, f"{mean:.2f}", mean > AVERAGE)


def _each(what: str, found: list[float], limit: float, at_most: bool) -> Reached:
    """A goal for each of several figures; shown is how many met it, and the worst."""
    goal = _text(limit, at_most)
    if not found:
        return Reached(what, goal)
    met = sum(value <= limit if at_most else value >= limit for value in found)
    worst = max(found) if at_most else min(found)
    return Reached(what, goal, f"{met} of {len(found)}, worst {worst:.3f}", met == len(found))


def _one(what: str, value: float | None, limit: float, at_most: bool) -> Reached:
    if value is None:
        return Reached(what, _text(limit, at_most))
    return Reached(what, _text(limit, at_most), f"{value:.3f}", value <= limit if at_most else value >= limit)


def _text(limit: float, at_most: bool) -> str:
    return f"{'<=' if at_most else '>='} {limit:g}"


def _figure(result: Plain, stage: str, name: str) -> float | None:
    found = result_of(result, stage).get(name)
    return float(found["value"]) if isinstance(found, dict) and "value" in found else None


def _values(groups: list[Plain], name: str) -> list[float]:
    return [float(group[name]["value"]) for group in groups if name in group]
