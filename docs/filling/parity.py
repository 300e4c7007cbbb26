"""Runs of the parity harness as one table: a folder for each, with the files that the run left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from filling.results import machine_of, table

FILES = ("config.yaml", "environment.json", "metrics.json")
SHARES = ("tokens_as_single", "tokens_as_chunked", "logits_as_chunked")
HEADINGS = ("model", "weights in", "rows, tasks", "run", "runs", "= single", "= chunked", "logits", "chunks loaded")


def all_runs(folders: Sequence[Path]) -> str:
    """A row for each run and mode, over all its tasks, with the machine that each was run on."""
    runs = [
        (folder.name, *(yaml.safe_load((folder / name).read_text()) for name in FILES))  # JSON is YAML
        for folder in folders
    ]
    rows = [row for name, _, environment, metrics in runs for row in _rows(name, environment, metrics)]
    notes = [
        f"{name}: {machine_of(environment['machine'])} {_verdict(config, metrics)}"
        for name, config, environment, metrics in runs
    ]
    return "\n\n".join([table(HEADINGS, rows), *notes])


def _rows(name: str, environment: dict[str, Any], metrics: dict[str, Any]) -> list[list[str]]:
    modes = {mode: None for task in metrics["tasks"].values() for mode in task["modes"]}
    dtype = environment["numerics"]["dtype"].removeprefix("torch.")
    size = f"{metrics['rows']}, {len(metrics['tasks'])}"
    return [[name, dtype, size, mode, *_figures(metrics, mode)] for mode in modes]


def _figures(metrics: dict[str, Any], mode: str) -> list[str]:
    found = [task["modes"][mode] for task in metrics["tasks"].values() if mode in task["modes"]]
    runs = sum(one["rows"] for one in found)
    shares = [sum(one[share] * one["rows"] for one in found) / runs for share in SHARES]
    loaded = sorted(one["loaded"] for one in found if one["loaded"] is not None)
    ends = dict.fromkeys(map(_percent, (*loaded[:1], *loaded[-1:])))  # of the tasks; one where they are equal
    return [str(runs), *map(_percent, shares), " to ".join(ends)]


def _percent(share: float) -> str:
    """Rounded down: 100 % is all."""
    return f"{int(1000 * share + 1e-6) / 10:g} %"


def _verdict(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    lost = f"{metrics['cut']} prompts were cut in the middle, {len(metrics['skipped'])} rows left out as too long."
    wrong = f"**{len(metrics['broken'])} places are not exact.**" if metrics["broken"] else "Exact."
    parted = f"{len(metrics['differences'])} runs part from the single-shot one at a near tie; " * bool(
        metrics["differences"]
    )
    return f"At most {config['max_tokens']:,} tokens in chunks of {config['chunk_size']}; {parted}{lost} {wrong}"
