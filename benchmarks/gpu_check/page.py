"""Writes docs/gpu-results.md from the results in benchmarks/results/gpu/: `python -m benchmarks.gpu_check.page`.

Standard library only. A test notices when the page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.goals import Plain, eta, goals, mismatches, reached, result_of, speed_ups
from benchmarks.gpu_check.outcome import DONE, read
from benchmarks.gpu_check.paper import AVERAGE, CELLS, ETA

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "gpu-results.md"
RESULTS = ROOT / "benchmarks" / "results" / "gpu"

HEAD = """# Results on GPUs

This page is written by `python -m benchmarks.gpu_check.page` from the files in `benchmarks/results/gpu/`.
"""

NOT_RUN = "**Not run yet.** The check has not run on a GPU."

HOW = f"""## How to run it

From a checkout, on a machine with one GPU of 40 GB or more, 32 GB of memory and 16 GB of free disk:

```text
scripts/gpu_check.sh OUT
```

It takes at most nine minutes, in stages, each a process with a time limit of its own. Results are written after each stage,
and a stage that fails or runs out of time takes nothing from the others. `--from STAGE` goes on with that stage, `--only STAGE`
takes it alone, and both add to what is in `OUT`. `--rehearse` runs tiny sizes on the CPU, only to see that it runs.

PyTorch and transformers 5 have to be installed. Of what the package needs beside them, only `xxhash` does not come with them.
On a machine without a package index, bring its wheel: `scripts/gpu_check.sh OUT --wheels DIR`.

Then copy `OUT/gpu-check.json` to `{RESULTS.relative_to(ROOT).as_posix()}/NAME.json`, and write this page anew.
"""

MEANING = """## What is measured

A random-weight model with the shape of Llama-3.1-8B in bfloat16, chunks of 512 tokens. The first token of prompts of 4K to
32K tokens, all stored, is timed when everything is computed, when everything is loaded, and with both ends. The three take
turns, and figures are medians of three rounds. The words are those of [Performance](performance.md).

**Lines.** As in the paper, a line of so many Gbps is a delay: a chunk arrives no sooner than its bytes take at that rate. Here
the chunks behind it come from a copy in memory. The delay is made in Python, with sleeps. Where loads alone did not come to
90 % of a rate, it is above what such a throttle can do: the table says what they came to, and eta is that for the rate that was
reached. *memory* is a store in this process, *disk* a directory whose files are in the page cache.
"""


def whole(results: Sequence[tuple[str, Plain]]) -> str:
    """The page.

    Args:
        results: (name, content) of each.
    """
    parts = [HEAD] if results else [HEAD, NOT_RUN + "\n"]
    parts += [f"## {name}\n\n{of_result(content)}\n" for name, content in results]
    if not results:
        parts.append(f"## Beside the paper\n\n{_beside_the_paper({})}\n\n{_goals({})}\n")
    return "\n".join([*parts, MEANING, HOW])


def of_result(result: Plain) -> str:
    """One result, as Markdown."""
    parts = [
        "**A rehearsal with tiny sizes: its figures mean nothing.**" if result.get("rehearsal") else "",
        machine(result.get("machine", {})),
        _goals(result),
        _stages(result.get("stages", {})),
        _beside_the_paper(result),
        _cells(result),
        _figures(result),
        *(f"* {sentence}" for sentence in _unmet(result)),
    ]
    return "\n\n".join(filter(None, parts))


def machine(found: Plain) -> str:
    """What it was measured on, and with."""
    if not found:
        return "The machine is not known: no stage got so far."
    parts = [
        f"{found.get('cpu', 'unknown processor')}, {found.get('cores', '?')} cores, {found.get('memory_gib', '?')} GiB"
    ]
    if "gpu" in found:
        parts.insert(0, f"{found['gpu']} ({found.get('gpu_memory_gib', '?')} GiB, driver {found.get('driver')})")
    if "disk_gib" in found:
        parts.append(f"disk {found['disk_kind'] or 'of unknown kind'}, {found['disk_free_gib']} GiB free")
    parts += [f"{name} {found[name]}" for name in ("python", "torch", "transformers", "cake_hf") if name in found]
    return f"**Measured on** {'; '.join(parts)}."


def _goals(result: Plain) -> str:
    met = {None: "not measured", True: "yes", False: "**no**"}
    rows = [[goal.what, goal.goal, goal.value, met[goal.met]] for goal in goals(result)]
    return _table(["figure", "goal", "reached", "met"], rows)


def _stages(stages: Plain) -> str:
    rows = [
        [
            name,
            stage["status"],
            *(f"{stage[key]:.0f}" if key in stage else "" for key in ("seconds", "limit")),
            stage.get("reason", ""),
        ]
        for name, stage in stages.items()
    ]
    return _table(["stage", "status", "seconds", "of", ""], rows)


def _beside_the_paper(result: Plain) -> str:
    """The paper's cells; beside the one of the same model, ours."""
    found = {
        (group["tokens"], round(cell["gbps"])): speed_ups(group, cell)
        for group in result_of(result, "ttft").get("grid", {}).get("groups", [])
        for cell in group["cells"]
        if cell["throttled"]
    }
    rows = []
    for cell in CELLS:
        ours = found.get((cell.tokens, cell.gbps)) if cell.ours else None
        shown = ours or ("", "") if cell.ours else ("another model", "another model")
        rows.append(
            [cell.where, f"{cell.tokens // 1024}K", f"{cell.gbps}"]
            + [_times(factor) for factor in (cell.over_load, cell.over_compute, *shown)]
        )
    headings = ["published", "tokens", "Gbps", "over load-only", "over compute-only", "ours", "ours"]
    told = f"The paper's average over all of its cells is {AVERAGE} times as fast; eta {ETA}. It gives no repeats."
    return f"{_table(headings, rows)}\n\n{told}"


def _cells(result: Plain) -> str:
    """Our grid, a row for each length and store."""
    rows = []
    for group in result_of(result, "ttft").get("grid", {}).get("groups", []):
        for cell in group["cells"]:
            came = "" if reached(cell) else f" (came to {cell['reached_gbps']:.3g})"
            seconds = [group["compute_seconds"], *(cell[f"{name}_seconds"] for name in ("load", "both", "limit"))]
            rows.append(
                [f"{group['tokens']:,}", cell["source"], f"{cell['gbps']:.3g}{came}"]
                + [f"{figure['value']:.3f}" for figure in seconds]
                + [_judged(cell["ratio"]["value"], cell["ratio"]["met"]), f"{eta(cell):.2f}"]
                + [_times(factor) for factor in speed_ups(group, cell)]
            )
    headings = ["tokens", "store", "Gbps", "compute only", "load only", "both", "T\\*", "over the better one", "eta"]
    return _table([*headings, "over load", "over compute"], rows)


def _figures(result: Plain) -> str:
    """All single figures of the other stages."""
    rows = [
        [stage, figure["label"] + ("" if figure["unit"] in ("x", "") else f", {figure['unit']}")]
        + [f"{figure[key]:.4g}" for key in ("value", "low", "high")]
        for stage, content in result.get("stages", {}).items()
        if stage != "ttft"
        for figure in _all(content.get("result", {}))
    ]
    return _table(["stage", "figure", "median", "low", "high"], rows)


def _all(part: Any) -> Iterator[Plain]:
    if isinstance(part, dict) and {"label", "value", "unit"} <= part.keys():
        yield part
    elif isinstance(part, dict):
        for value in part.values():
            yield from _all(value)


def _unmet(result: Plain) -> Iterator[str]:
    """What a reader has to know: bits that differ, models and lengths that were left out."""
    for stage in result.get("stages", {}).values():
        yield from mismatches(stage.get("result", {}))
    left = [
        *result_of(result, "parity").get("left_out", []),
        *result_of(result, "ttft").get("grid", {}).get("left_out", []),
    ]
    if left:
        yield f"Left out, for want of time: {'; '.join(left)}."
    yield from (
        f"{name}: {stage['status']}" for name, stage in result.get("stages", {}).items() if stage["status"] != DONE
    )


def _judged(value: float, met: bool | None) -> str:
    return f"**{value:.3f}**" if met is False else f"{value:.3f}"


def _times(factor: float | str | None) -> str:
    return factor if isinstance(factor, str) else "" if factor is None else f"{factor:.2f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def stored(folder: Path = RESULTS) -> list[tuple[str, Plain]]:
    """All results of a folder, by the name of the file.

    Raises:
        ValueError: one of them is no such result, or a rehearsal's.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        content = read(path)
        if "stages" not in content or content.get("rehearsal"):
            raise ValueError(f"{path.name} is not the result of a check on a GPU.")
        found.append((path.stem, content))
    return found


def main() -> int:
    """Write the page."""
    PAGE.write_text(whole(stored()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
