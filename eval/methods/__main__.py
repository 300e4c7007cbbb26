"""`python -m eval.methods --model MODEL --data FOLDER`: other papers' methods on a restored prompt, on LongBench.

Results go to `--out`, one JSON line per row and method, and a summary beside it; `--page` fills docs/methods.md from them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Machine
from benchmarks.traces.questions import SHOTS, many_shot
from cake_hf.cli.models import load_model, load_tokenizer
from eval.data.prompts import load_templates
from eval.data.rows import Row
from eval.data.shorten import CHARS_PER_TOKEN
from eval.data.sources import Source, load_rows
from eval.methods.contestants import chosen, contestants
from eval.methods.runs import Runner, split_row
from eval.methods.tables import fill, page, summary
from eval.tasks import Task, find_task

ROOT = Path(__file__).parent.parent.parent
TASKS = "trec,triviaqa,samsum,lcc,repobench-p,hotpotqa,2wikimqa,multifieldqa_en"
SHOTS_ASKED = 3
"""Examples of a few-shot row that become questions about those before them, where there are too few rows."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    asked = _options(arguments)
    if not asked.page:
        _measure(asked)
    lines = [json.loads(line) for line in asked.out.read_text(encoding="utf-8").splitlines()]
    result = summary(lines)
    asked.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = page(result)
    print(text)
    if asked.page:
        fill(ROOT / "docs" / "methods.md", text)
    return 0


def _measure(asked: argparse.Namespace) -> None:
    if asked.threads:
        torch.set_num_threads(asked.threads)
    machine = Machine()
    model, tokenizer = load_model(asked.model, asked.dtype, "cpu"), load_tokenizer(asked.model)
    done: set[tuple[str, str, str]] = set()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    if asked.out.exists():
        found = [json.loads(line) for line in asked.out.read_text(encoding="utf-8").splitlines()]
        done = {(line["task"], line["row"], line["method"]) for line in found}
    templates = load_templates()
    with tempfile.TemporaryDirectory() as folder, asked.out.open("a", encoding="utf-8") as out:
        methods = chosen(contestants(asked.less, asked.shared), asked.method)
        runner = Runner(model, tokenizer, Path(folder), asked.answer, methods)
        for turn, (task, row) in enumerate(rows_in_turn(asked)):
            missing = [name for name in runner.methods if (task.name, row.id, name) not in done]
            if not missing:
                continue
            document, question = split_row(tokenizer, task, templates[task.name], row, asked.tokens)
            for line in runner.run(task, row, document, question, missing, measure=turn < asked.measured):
                setting = {"model": Path(asked.model).name, "dtype": asked.dtype, "threads": torch.get_num_threads()}
                print(json.dumps({**line, **setting, "machine": machine.as_dict()}), file=out, flush=True)
            print(f"{task.name} {row.id}: {len(document)} + {len(question)} tokens", file=sys.stderr, flush=True)


def rows_in_turn(asked: argparse.Namespace) -> Iterator[tuple[Task, Row]]:
    """Yields a row of each task, then the next ones, so that a run that is stopped has as many of each."""
    tasks = [find_task(name) for name in asked.tasks.split(",")]
    for turn in zip_longest(*(rows_of(task, asked) for task in tasks)):
        yield from ((task, row) for task, row in zip(tasks, turn, strict=True) if row is not None)


def rows_of(task: Task, asked: argparse.Namespace) -> list[Row]:
    """Returns the first rows of a task; if there are fewer, few-shot tasks go on with examples of these as questions."""
    found = load_rows(task, Source(data=asked.data, rows=asked.rows)).rows
    if task.name in SHOTS:
        shots = [many_shot(row, SHOTS_ASKED, CHARS_PER_TOKEN * asked.tokens) for row in found]
        found += [replace(one, history=()) for turn in zip_longest(*shots) for one in turn if one is not None]
    return found[: asked.rows]


def _options(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m eval.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="folder, or name on the Hub")
    parser.add_argument("--data", default="", help="folder with LongBench's <task>.jsonl")
    parser.add_argument("--tasks", default=TASKS, help=f"with commas [default: {TASKS}]")
    parser.add_argument("--rows", type=int, default=10, help="of each task [default: 10]")
    parser.add_argument("--tokens", type=int, default=2048, help="longer documents are cut [default: 2048]")
    parser.add_argument("--answer", type=int, default=32, help="the most tokens of an answer [default: 32]")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1, help="of torch [default: 1; 0 for its own choice]")
    parser.add_argument("--measured", type=int, default=5, help="rows of which the error is measured, too [default: 5]")
    parser.add_argument("--method", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--less", type=Path, help="kernels for LESS, from training/train_less.py")
    parser.add_argument("--shared", type=Path, help="layers for KVSharer, from training/share_layers.py")
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results" / "methods" / "rows.jsonl")
    parser.add_argument("--page", action="store_true", help="measure nothing: the table in docs/methods.md, from --out")
    asked = parser.parse_args(arguments)
    if not asked.page and not (asked.model and asked.data):
        parser.error("--model and --data are needed to measure")
    return asked


if __name__ == "__main__":
    sys.exit(main())
