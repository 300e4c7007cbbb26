"""How often does an answer in low precision differ from single-shot `generate`, by chunk size?

A prompt in pieces rounds otherwise than in one, in every library, and at a near tie that may decide a token. So does another
number of prompts in a batch, or another attention kernel, for single-shot itself; the rates stand beside each other here.

    python -m eval.chunk_sizes --model HuggingFaceTB/SmolLM2-135M-Instruct --data longbench --tasks qasper,hotpotqa
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

SIZES = (64, 128, 256, 512)
Z = 1.96
"""Of a 95 % interval."""


def prompts(folder: Path, tasks: Sequence[str], tokenizer: Any, rows: int, tokens: int) -> Iterator[torch.Tensor]:
    """Returns prompts, `[1, tokens]` each: a part of a document, and a question about it. The documents' beginnings come
    first, then their later parts.

    Raises:
        ValueError: there are not so many.
    """
    asked = [json.loads(line) for task in tasks for line in (folder / f"{task}.jsonl").open(encoding="utf-8")]
    documents = [tokenizer(row["context"], return_tensors="pt", verbose=False).input_ids for row in asked]
    found = 0
    for part in range(max(document.shape[1] for document in documents) // tokens):
        for row, document in zip(asked, documents, strict=True):
            question = tokenizer(f"\n\nQuestion: {row['input'][-400:]}\nAnswer:", return_tensors="pt").input_ids
            piece = document[:, part * tokens : (part + 1) * tokens - question.shape[1]]
            if piece.shape[1] + question.shape[1] == tokens:
                yield torch.cat([piece, question], dim=1)
                if (found := found + 1) == rows:
                    return
    raise ValueError(f"The tasks have {found} rows of that length; name more of them.")


def answer(model: Any, ids: torch.Tensor, new_tokens: int, **options: Any) -> list[int]:
    """Returns the greedy answer to the first row."""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
    )
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


def ways(
    model: Any, new_tokens: int, sizes: Sequence[int], also: bool
) -> dict[str, Callable[[torch.Tensor], list[int]]]:
    """Returns the runs that are compared with single-shot, by name."""

    def in_chunks(size: int) -> Callable[[torch.Tensor], list[int]]:
        return lambda ids: answer(
            model, ids, new_tokens, prefill_chunk_size=size, cache=DynamicCache(config=model.config)
        )

    def eagerly(ids: torch.Tensor) -> list[int]:
        model.set_attn_implementation("eager")
        try:
            return answer(model, ids, new_tokens)
        finally:
            model.set_attn_implementation("sdpa")

    chunked = {f"chunks of {size}": in_chunks(size) for size in sizes}
    others: dict[str, Callable[[torch.Tensor], list[int]]] = {
        "two equal rows in a batch": lambda ids: answer(model, ids.repeat(2, 1), new_tokens),
        "eager attention": eagerly,
    }
    return {**chunked, **others} if also else chunked


def interval(differing: int, rows: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share."""
    share, scale = differing / rows, 1 + Z * Z / rows
    centre = (share + Z * Z / (2 * rows)) / scale
    half = Z * math.sqrt(share * (1 - share) / rows + Z * Z / (4 * rows * rows)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(
    model: Any,
    asked: Sequence[torch.Tensor],
    new_tokens: int,
    compared: dict[str, Callable[[torch.Tensor], list[int]]],
    done: Callable[[int, dict[str, int]], None],
) -> dict[str, int]:
    """Counts, for each way, the answers that differ from single-shot; calls `done` after each row."""
    differing = dict.fromkeys(compared, 0)
    for number, ids in enumerate(asked, 1):
        single = answer(model, ids, new_tokens)
        for name, way in compared.items():
            differing[name] += way(ids) != single
        done(number, differing)
    return differing


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    parser.add_argument("--data", type=Path, required=True, help="the folder with LongBench's <task>.jsonl")
    parser.add_argument("--tasks", default="qasper,hotpotqa,multifieldqa_en,2wikimqa,musique,narrativeqa,triviaqa")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=1200, help="number of tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--also", action="store_true", help="also run two rows in a batch, and eager attention")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype)).eval()
    texts = list(prompts(asked.data, asked.tasks.split(","), tokenizer, asked.rows, asked.tokens))
    sizes = [int(size) for size in asked.sizes.split(",")]
    facts = {
        "model": Path(asked.model).name,
        "dtype": asked.dtype,
        "tokens": asked.tokens,
        "new_tokens": asked.new_tokens,
        "tasks": asked.tasks,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

    def done(rows: int, differing: dict[str, int]) -> None:
        print(f"{rows} of {len(texts)}: {differing}", flush=True)
        if asked.output:
            spans = {name: [round(end, 4) for end in interval(count, rows)] for name, count in differing.items()}
            result = {**facts, "rows": rows, "differing": differing, "interval": spans}
            asked.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    compared = ways(model, asked.new_tokens, sizes, asked.also)
    for name, count in measure(model, texts, asked.new_tokens, compared, done).items():
        low, high = interval(count, len(texts))
        print(f"{name:<28} {count:>3} of {len(texts)}  ({100 * low:.0f} to {100 * high:.0f} %)")


if __name__ == "__main__":
    main()
