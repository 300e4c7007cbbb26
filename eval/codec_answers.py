"""What lossy codecs do to answers: LongBench's questions, answered with coded KV, beside the answers with exact KV.

Each prompt runs through a cache with an empty store, once for each codec, and again from what that has saved. The second answer
has to be the first one, token for token: a lossy run is the same, whatever is stored.

    python -m eval.codec_answers --model HuggingFaceTB/SmolLM2-135M-Instruct --data longbench --out eval/answers.jsonl

A row is written when it is done, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cake_hf import CakeCache, MemoryStore
from cake_hf.chunks.lossy import LOSSY
from cake_hf.cli.models import load_model, load_tokenizer
from cake_hf.report import Report
from eval.data.prompts import load_templates
from eval.methods.__main__ import rows_in_turn
from eval.methods.runs import ask, split_row
from eval.scores import score
from eval.tasks import Task

EXACT = "none"
EAGER = "none, eager attention"
"""Exact KV, too, of another implementation of attention, which rounds otherwise: so many answers differ without any loss."""

TASKS = "trec,triviaqa,samsum,lcc,repobench-p"


def answer(model: Any, tokenizer: Any, ids: torch.Tensor, task: Task, new: int, codec: str) -> dict[str, Any]:
    """Returns the answer to a prompt `[1, tokens]` with a codec, and how many of its tokens that coded.

    Raises:
        RuntimeError: the answer from the saved chunks is another one.
    """
    store = MemoryStore()
    computed, _ = _ask(model, tokenizer, ids, task, new, codec, store, "both")
    loaded, report = _ask(model, tokenizer, ids, task, new, codec, store, "load")
    if not report.chunks_loaded or report.chunks_computed:
        raise RuntimeError(f"{codec}: not all chunks came from the store: {report}")
    if computed != loaded:
        raise RuntimeError(f"{codec}: the answer from the saved chunks is another one.")
    return {"tokens": loaded, "lossy": report.tokens_lossy}


def _ask(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    task: Task,
    new: int,
    codec: str,
    store: MemoryStore,
    strategy: str,
) -> tuple[list[int], Report]:
    options: dict[str, Any] = {} if codec in (EXACT, EAGER) else {"exact": False, "codec": codec}
    own = model.config._attn_implementation
    model.set_attn_implementation("eager" if codec == EAGER else own)
    try:
        with CakeCache(model, store, strategy=strategy, **options) as cache:
            return ask(model, tokenizer, task, ids, cache, new)[0], cache.report
    finally:
        model.set_attn_implementation(own)


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns by codec, of the rows that all codecs have answered: rows, equal answers, and the mean score of each task."""
    codecs = list(dict.fromkeys(line["codec"] for line in lines))
    by_row: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        by_row.setdefault((line["task"], line["row"]), {})[line["codec"]] = line
    whole = {row: found for row, found in by_row.items() if set(found) == set(codecs)}
    result = {}
    for codec in codecs:
        tasks: dict[str, list[float]] = {}
        for (task, _), found in whole.items():
            tasks.setdefault(task, []).append(found[codec]["score"])
        means = {task: round(sum(scores) / len(scores), 4) for task, scores in tasks.items()}
        result[codec] = {
            "rows": len(whole),
            "equal": sum(found[codec]["tokens"] == found[EXACT]["tokens"] for found in whole.values()),
            "score": round(sum(means.values()) / len(means), 4) if means else None,
            "tasks": means,
        }
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers what is missing, and prints a table."""
    asked = _options(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []
    done = {(line["task"], line["row"], line["codec"]) for line in lines}
    model, tokenizer = load_model(asked.model, asked.dtype, "cpu"), load_tokenizer(asked.model)
    templates = load_templates()
    with asked.out.open("a", encoding="utf-8") as out:
        for task, row in rows_in_turn(asked):
            document, question = split_row(tokenizer, task, templates[task.name], row, asked.tokens)
            for codec in (EXACT, EAGER, *asked.codecs.split(",")):
                if (task.name, row.id, codec) in done:
                    continue
                found = answer(model, tokenizer, torch.tensor([document + question]), task, asked.answer, codec)
                text = tokenizer.decode(found["tokens"], skip_special_tokens=True)
                line = {
                    "task": task.name,
                    "row": row.id,
                    "codec": codec,
                    "prompt": len(document) + len(question),
                    **found,
                }
                lines.append({**line, "score": score(task, text, row.answers, row.classes)})
                print(json.dumps(lines[-1]), file=out, flush=True)
            print(f"{task.name} {row.id}", file=sys.stderr, flush=True)
    result = {"model": Path(asked.model).name, "dtype": asked.dtype, "tokens": asked.tokens, "codecs": summary(lines)}
    asked.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for codec, found in result["codecs"].items():
        print(f"{codec:<20} {found['equal']:>3} of {found['rows']} answers equal, score {found['score']}")


def _options(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    parser.add_argument("--data", required=True, help="the folder with LongBench's <task>.jsonl")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--rows", type=int, default=20, help="of each task")
    parser.add_argument("--tokens", type=int, default=1024, help="longer documents are cut")
    parser.add_argument("--answer", type=int, default=16, help="the most tokens of an answer")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--codecs", default=",".join(LOSSY))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; a summary is written beside it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
