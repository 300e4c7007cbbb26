"""Result files of the bench as tables. All is found by its form, not by its name, so newer files just take the place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

AT = re.compile(r"(\w+)_at_([\d.]+)")
STRATEGIES = ("load_seconds", "both_seconds", "limit_seconds", "ratio", "eta")
HEADINGS = ("load only", "both", "T\\*", "over the better one", "eta")
DETAILS = "details"
"""Where a measurement keeps what its figures were made of."""
TROUBLE = {"failures": "Failed", "faults": "Faults", "left_out": "Left out, for want of time"}
"""Lists of a result that a reader has to know of, and how they are announced."""


def all_results(files: Sequence[Path]) -> str:
    """A section for each file, with the machine that it was measured on."""
    return "\n\n".join(f"## {file.stem}\n\n{one_result(json.loads(file.read_text()))}" for file in files)


def one_result(result: dict[str, Any]) -> str:
    """Machine, settings and tables of one file; of a form that is not known, one table of all its figures."""
    parts = [machine_of(result.get("machine", {}))]
    if "groups" in result:
        parts += [_axes(result["axes"]), _grid(result["groups"])]
        rest = {name: part for name, part in result.items() if name != "groups"}
    else:
        parts.append(_settings(result.get("settings", {})))
        parts += [_by_load(result)] if any(AT.fullmatch(path[-1]) for path, _ in figures(result)) else []
        rest = result
    parts.append(_figures([(path, figure) for path, figure in figures(rest) if not AT.fullmatch(path[-1])]))
    parts.append(_parity(result.get("parity", {})))
    parts += [f"{words}: {'; '.join(map(str, result[name]))}." for name, words in TROUBLE.items() if result.get(name)]
    return "\n\n".join(filter(None, parts))


def figures(part: Any, path: tuple[str, ...] = ("",)) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """All figures in a part of a result, wherever they are, with the way to each: the last step is its short name."""
    if isinstance(part, dict) and {"label", "value", "unit"} <= part.keys():
        yield path, part
    elif isinstance(part, dict):
        for name, value in part.items():
            if name != DETAILS:
                yield from figures(value, (*path, name))
    elif isinstance(part, list):
        for value in part:
            yield from figures(value, path)


def machine_of(machine: dict[str, Any]) -> str:
    """Where it was measured, and with what."""
    processor = f"{machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores, "
    memory = f"{machine.get('memory_gib', '?')} GiB"
    graphics = f", {machine['gpu']} ({machine.get('gpu_memory_gib', '?')} GiB)" if "gpu" in machine else ", no GPU used"
    versions = [f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "cake_hf") if name in machine]
    load = f"load average before it began: {machine.get('load_average_before', 'not known')}"
    stolen = f"{machine['stolen_share']:.1%} of its time stolen by other machines" if "stolen_share" in machine else ""
    return f"**Measured on** {processor}{memory}{graphics}; {', '.join(filter(None, [*versions, load, stolen]))}."


def _settings(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    shape = settings.get("shape", {})
    model = f"random weights, {shape.get('layers', '?')} layers of {shape.get('hidden', '?')}"
    return (
        f"**Settings:** {model}, {settings.get('dtype')}; {settings.get('tokens', 0):,} tokens in chunks of "
        f"{settings.get('chunk_size')}; {settings.get('repeats')} rounds."
    )


def _axes(axes: dict[str, Any]) -> str:
    return (
        f"**Settings:** model {', '.join(axes['shapes'])}, {axes['dtype']} on {axes['device']}; chunks of "
        f"{axes['chunk_size']} tokens; {axes['repeats']} rounds. Each row is one length and one store."
    )


def _by_load(result: dict[str, Any]) -> str:
    """Both ends against each alone, a row for each bandwidth of the store."""
    found = {path[-1]: figure for path, figure in figures(result)}
    ratios = sorted({match[2] for name in found if (match := AT.fullmatch(name))}, key=float)
    rows = [
        [f"{ratio} times as long", _text(found.get("compute_seconds"))]
        + [_text(found.get(f"{name}_at_{ratio}")) for name in STRATEGIES]
        for ratio in ratios
    ]
    return "Seconds to the first token.\n\n" + table(["loading takes", "compute only", *HEADINGS], rows)


def _grid(groups: Sequence[dict[str, Any]]) -> str:
    rows = [
        [group["shape"], f"{group['tokens']:,}", f"{group['share']:.0%}", cell["source"], f"{cell['gbps']:.3g}"]
        + [_text(group.get("compute_seconds"))]
        + [_text(cell.get(name)) for name in STRATEGIES]
        for group in groups
        for cell in group["cells"]
    ]
    shown = table(["model", "tokens", "device left", "store", "Gbps", "compute only", *HEADINGS], rows)
    failed = [f"* {group['shape']}, {group['tokens']:,} tokens failed" for group in groups if group.get("failure")]
    return "\n\n".join(["Seconds to the first token.", shown, *failed])


def _figures(found: Sequence[tuple[tuple[str, ...], dict[str, Any]]]) -> str:
    rows = [
        [
            path[-2] if len(path) > 1 else "",
            figure["label"] + (f", {figure['unit']}" if figure["unit"] != "x" else ""),
            *(_number(figure[name]) for name in ("value", "low", "high")),
            figure.get("goal") or "",
            {None: "", True: "yes", False: "**no**"}[figure.get("met")],
        ]
        for path, figure in found
    ]
    return table(["measured", "figure", "median", "low", "high", "goal", "met"], rows) if rows else ""


def _parity(parity: dict[str, Any]) -> str:
    """How many restored prompts gave the logits of a computed one; in a grid, of all its points together."""
    points = [parity] if "checks" in parity else [point for point in parity.values() if isinstance(point, dict)]
    checks = sum(point.get("checks", 0) for point in points)
    wrong = sum(len(point.get("mismatches", [])) for point in points)
    return f"Logits bit for bit as computed: {checks - wrong} of {checks} checks." if checks else ""


def _text(figure: dict[str, Any] | None) -> str:
    """A figure in a wide table: bold where its goal was missed."""
    if figure is None:
        return ""
    return f"**{_number(figure['value'])}**" if figure.get("met") is False else _number(figure["value"])


def _number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of texts, in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
