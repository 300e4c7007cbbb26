"""The results of replays as tables: for a terminal, and as Markdown for docs/traces.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.traces.methods import BOTH, COMPUTE, LOAD
from cake_hf.cli.sheets import Sheet

Rows = list[list[str]]
Found = Mapping[str, Any]

TTFT = ("<method", "alone: mean", "p50", "p90", "p99", "queued: mean", "p50", "p90", "p99", "requests/s")
AHEAD = ", loads ahead"

BUSY = 0.5
"""Load average for each core above which a machine counts as busy."""


def ttft_rows(cell: Found) -> Rows:
    """Returns a row for each method at one bandwidth, and one for loading ahead of the device."""
    rows = []
    for name, found in cell["methods"].items():
        rows.append([name, *_seconds(found["alone"]), *_seconds(found["queued"]), f"{found['per_second']:.2f}"])
    ahead = cell["methods"][LOAD]["ahead"]
    rows.append([LOAD + AHEAD, *[""] * 4, *_seconds(ahead["queued"]), f"{ahead['per_second']:.2f}"])
    return rows


def regret_rows(cells: Sequence[Found]) -> Rows:
    """Returns a row for each method: what it loses at each bandwidth."""
    return [[name, *(_regret(cell["regret"][name]) for cell in cells)] for name in cells[0]["regret"]]


def class_rows(cell: Found) -> Rows:
    """Returns a row for each method: what it loses on requests of which so much is stored."""
    return [[name, *(_regret(one["regret"][name]) for one in cell["classes"])] for name in cell["regret"]]


def class_headings(cell: Found) -> list[str]:
    """Returns the names of the classes."""
    return [f"from {one['from']:,}: {one['requests']:,}" for one in cell["classes"]]


def best_thresholds(cells: Sequence[Found]) -> Iterator[tuple[float, str, float, float]]:
    """Returns for each bandwidth the threshold that loses least there, what it loses, and what both ends lose."""
    for cell in cells:
        singles = {name: one["mean"] for name, one in cell["regret"].items() if name != BOTH}
        name = min(singles, key=lambda key: singles[key])
        yield cell["gbps"], name, singles[name], cell["regret"][BOTH]["mean"]


def sheets(title: str, details: Found) -> Iterator[Sheet]:
    """Returns the tables of one replay for a terminal."""
    cells = details["cells"]
    for cell in cells:
        yield Sheet(f"{title}, {cell['gbps']:g} Gbps: seconds to the first token", TTFT, ttft_rows(cell))
    yield Sheet(f"{title}: {LOSS}", ("<method", *(f"{cell['gbps']:g} Gbps" for cell in cells)), regret_rows(cells))


LOSS = "time lost against the best method of each request, in percent: all requests / the slowest of a hundred"


def page(results: Mapping[str, Found], shown: float) -> str:
    """Returns the section of docs/traces.md about the simulator.

    Args:
        results: of a result file: by name, each with its details.
        shown: the bandwidth whose times are shown; the nearest is taken.
    """
    parts = [
        markdown(("trace", "requests", "of these timed", "tokens", "output", "shared", "hit"), _trace_rows(results))
    ]
    for name, result in results.items():
        details = result["details"]
        cells = details["cells"]
        cell = min(cells, key=lambda one: abs(one["gbps"] - shown))
        bandwidths = [f"{one['gbps']:g} Gbps" for one in cells]
        parts += [f"### {name}", f"Seconds to the first token at {cell['gbps']:g} Gbps:"]
        parts += [markdown([one.lstrip("<") for one in TTFT], ttft_rows(cell))]
        parts += [f"{LOSS.capitalize()}:", markdown(("method", *bandwidths), regret_rows(cells))]
        parts += [
            f"The same at {cell['gbps']:g} Gbps, by stored tokens and number of requests:",
            markdown(("method", *class_headings(cell)), class_rows(cell)),
        ]
        parts.append(_thresholds(cells))
    return "\n\n".join(parts)


def live_page(result: Found) -> str:
    """Returns the section of docs/traces.md about replays with a model."""
    headings = ("trace", "loading over computing", "hit", *next(iter(result["results"].values()))["details"]["methods"])
    rows = []
    for one in result["results"].values():
        details = one["details"]
        plain = details["methods"][COMPUTE]["mean"]
        times = [f"{found['mean'] / plain:.2f}" for found in details["methods"].values()]
        rows.append([details["name"], f"{details['loading']:g}", f"{details['hit_share']:.0%}", *times])
    other = [name for one in result["results"].values() for name in one["details"]["other_tokens"]]
    equal = f"**Other tokens:** {', '.join(sorted(set(other)))}." if other else "The tokens are the same in all ways."
    how = f"{result['model']} in {result['dtype']}, chunks of {result['chunk_size']} tokens"
    return "\n\n".join([f"**{how}.** Measured on {machine(result['machine'])}.", markdown(headings, rows), equal])


def turns_page(result: Found) -> str:
    """Returns the section of docs/traces.md about several questions per document."""
    whose = " Seconds are those of the processor." if result.get("processor") else ""
    parts = [f"**{result['model']} in {result['dtype']}.** Measured on {machine(result['machine'])}.{whose}"]
    for one in result["results"].values():
        details = one["details"]
        methods = details["methods"]
        turns = max(len(found["ttfts"]) for found in methods.values())
        numbers = range(1, turns + 1)
        headings = ("method", "score", *(f"turn {one}" for one in numbers), *(f"turn {one}, s" for one in numbers))
        rows = [
            [
                name,
                *(f"{100 * value:.1f}" for value in (found["score"], *found["scores"])),
                *(f"{ttft:.3f}" for ttft in found["ttfts"]),
            ]
            for name, found in methods.items()
        ]
        parts.append(f"### {details['task']}: {details['documents']} documents of {details['tokens']:,.0f} tokens")
        parts.append(markdown(headings, rows))
    return "\n\n".join(parts)


def machine(found: Found) -> str:
    """Describes the machine."""
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "transformers", "cake_hf"))
    load = found["load_average_before"]
    told = f"{found['cpu']}, {found['cores']} cores, no GPU; torch threads: {found['torch_threads']}; {versions}; "
    busy = (
        "; **the machine was busy with other programs, so its seconds are rough**"
        if (load or 0) > BUSY * found["cores"]
        else ""
    )
    return f"{told}load average before it began: {load}{busy}"


def _trace_rows(results: Mapping[str, Found]) -> Rows:
    rows = []
    for name, result in results.items():
        trace, hit = result["details"]["trace"], result["details"]["cells"][0]["hit_share"]
        numbers = [
            f"{trace['requests']:,}",
            f"{result['details']['measured']:,}",
            f"{trace['tokens']:,.0f}",
            f"{trace['output']:,.0f}",
        ]
        rows.append([name, *numbers, f"{trace['shared']:.0%}", f"{hit:.0%}"])
    return rows


def _thresholds(cells: Sequence[Found]) -> str:
    said = [
        f"{gbps:g} Gbps: {name} loses {loss:.1%}, both ends {both:.1%}"
        for gbps, name, loss, both in best_thresholds(cells)
    ]
    return f"The best single rule at each bandwidth: {'; '.join(said)}."


def _seconds(spread: Found) -> list[str]:
    return [f"{spread[name]:.3g}" for name in ("mean", "p50", "p90", "p99")]


def _regret(found: Found) -> str:
    return f"{100 * found['mean']:.1f} / {100 * found['p99']:.0f}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def fill(path: Path, name: str, text: str) -> None:
    """Puts a text between `<!-- NAME -->` and `<!-- end of NAME -->` in a page.

    Raises:
        ValueError: the page is not there, or has no such place.
    """
    if not path.is_file():
        raise ValueError(f"There is no page {path}.")
    place = re.compile(rf"(<!-- {re.escape(name)} -->)\n.*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    after, count = place.subn(lambda found: f"{found[1]}\n{text}\n{found[2]}", path.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{path} has {count} places for {name}; one is wanted.")
    path.write_text(after, encoding="utf-8")
