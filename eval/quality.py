"""What lossy codecs cost: a model's predictions on real texts with coded KV, against those with exact KV.

The start of each document is run in chunks on the canonical lossy schedule, once for each codec: every full chunk but the first
is coded before the next one runs. The model then reads on in the document, and its predictions are compared with those of the
exact run, token by token: KL divergence, equal most likely tokens, and perplexity. All codecs run as rows of one batch, so
that their forwards round alike.

The model computes in float32, and its KV is rounded to bfloat16 in every row, the exact one included, before it is coded: the
KV is that of a model in bfloat16, and a processor without bfloat16 arithmetic is not waited for.

    python -m eval.quality --model HuggingFaceTB/SmolLM2-135M-Instruct --data longbench --output eval/quality.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cake_hf.chunks.decoding import decode_into
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.chunks.lossy import LOSSY, code_chunk, lossy_method

PIECE = 64
"""Tokens of the continuation that run in one forward."""

TASKS = "gov_report,hotpotqa,lcc"


@dataclass
class Sums:
    """What one codec's predictions add up to.

    Attributes:
        kl: divergence from the exact predictions, in nats.
        equal: tokens whose most likely successor is that of the exact run.
        loss: of the document's own tokens, in nats.
        tokens: predicted.
        stored, raw: bytes of the coded chunks, with and without the codec.
        coding, decoding: seconds of this thread's own time; coding is encoding and decoding.
    """

    kl: float = 0.0
    equal: int = 0
    loss: float = 0.0
    tokens: int = 0
    stored: int = 0
    raw: int = 0
    coding: float = 0.0
    decoding: float = 0.0


def documents(folder: Path, tasks: Sequence[str], tokenizer: Any, rows: int, tokens: int) -> list[torch.Tensor]:
    """Returns the first `tokens` tokens, `[1, tokens]`, of the tasks' documents, in turn.

    Raises:
        ValueError: there are not so many of that length.
    """
    found = []
    texts = [(folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines() for task in tasks]
    for lines in zip(*texts, strict=False):
        for line in lines:
            ids = tokenizer(json.loads(line)["context"], return_tensors="pt", verbose=False).input_ids
            if ids.shape[1] >= tokens:
                found.append(ids[:, :tokens])
            if len(found) == rows:
                return found
    raise ValueError(f"The tasks have {len(found)} documents of that length; name more of them.")


@torch.inference_mode()
def compare(
    model: Any, ids: torch.Tensor, prefix: int, size: int, codecs: Sequence[str], sums: dict[str, Sums]
) -> None:
    """Adds one document to the sums; the first row is the exact run, "none".

    Args:
        model: any whose layers all keep each token.
        ids: `[1, tokens]`.
        prefix: tokens that are run in chunks.
        size: of a chunk.
        codecs: lossy ones.
        sums: by codec, and of "none".
    """
    rows = ["none", *codecs]
    cache = DynamicCache(config=model.config)
    for start in range(0, prefix, size):
        end = min(start + size, prefix)
        model(ids[:, start:end].expand(len(rows), -1), cache=cache, logits_to_keep=1)
        _as_bfloat16(cache, start, end)
        if start and end - start == size:
            for row, codec in enumerate(codecs, 1):
                _code(cache, row, start, end, codec, sums[codec])
    for start in range(prefix, ids.shape[1] - 1, PIECE):
        end = min(start + PIECE, ids.shape[1] - 1)
        logits = model(ids[:, start:end].expand(len(rows), -1), cache=cache).logits
        _as_bfloat16(cache, start, end)
        told, following = torch.log_softmax(logits.double(), -1), ids[0, start + 1 : end + 1, None]
        for row, codec in enumerate(rows):
            mine = sums[codec]
            mine.kl += float((told[0].exp() * (told[0] - told[row])).sum())
            mine.equal += int((told[row].argmax(-1) == told[0].argmax(-1)).sum())
            mine.loss -= float(told[row].gather(-1, following).sum())
            mine.tokens += end - start


def _as_bfloat16(cache: Any, start: int, end: int) -> None:
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            states[:, :, start:end] = states[:, :, start:end].bfloat16().to(states.dtype)


def _code(cache: Any, row: int, start: int, end: int, codec: str, sums: Sums) -> None:
    kept = [states[row, :, start:end] for layer in cache.layers for states in (layer.keys, layer.values)]
    chunks = [states.transpose(0, 1).to(torch.bfloat16).contiguous() for states in kept]
    names = [(f"layers.{layer}.{what}", layer) for layer in range(len(cache.layers)) for what in ("keys", "values")]
    pieces = [
        Piece(name, chunk.shape[1], chunk.shape[2], chunk.dtype, layer)
        for (name, layer), chunk in zip(names, chunks, strict=True)
    ]
    layout = ChunkLayout(end - start, tuple(pieces))
    payload = bytearray(b"".join(chunk.view(torch.uint8).numpy().tobytes() for chunk in chunks))
    begin = time.thread_time()
    encoded = code_chunk(memoryview(payload), layout, lossy_method(codec))
    sums.coding += time.thread_time() - begin
    decoded = [memoryview(bytearray(size)) for size in layout.sizes]
    begin = time.thread_time()
    decode_into(codec, encoded.bases, encoded.refinements, encoded.sizes, layout, decoded)
    sums.decoding += time.thread_time() - begin
    sums.stored, sums.raw = sums.stored + encoded.sizes.nbytes, sums.raw + layout.nbytes
    parts = torch.frombuffer(payload, dtype=torch.uint8).split(layout.sizes)
    for states, chunk, part in zip(kept, chunks, parts, strict=True):
        states.copy_(part.view(torch.bfloat16).view(chunk.shape).transpose(0, 1))


def figures(sums: dict[str, Sums]) -> dict[str, dict[str, float]]:
    """Returns, by codec, what stands in the result."""
    exact = sums["none"]
    return {
        codec: {
            "kl": float(f"{one.kl / one.tokens:.3g}"),
            "top1": round(one.equal / one.tokens, 4),
            "perplexity": round(math.exp((one.loss - exact.loss) / one.tokens), 4),
            "size": round(one.stored / one.raw, 4),
            "coded_mb_per_second": round(one.raw / one.coding / 1e6),
            "decoded_mb_per_second": round(one.raw / one.decoding / 1e6),
        }
        for codec, one in sums.items()
        if codec != "none"
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes the result after each document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    parser.add_argument("--data", type=Path, required=True, help="the folder with LongBench's <task>.jsonl")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--prefix", type=int, default=1024, help="tokens that are run in chunks")
    parser.add_argument("--tokens", type=int, default=256, help="tokens that are predicted after them")
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--codecs", default=",".join(LOSSY))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    codecs = asked.codecs.split(",")
    sums = {codec: Sums() for codec in ["none", *codecs]}
    texts = documents(asked.data, asked.tasks.split(","), tokenizer, asked.documents, asked.prefix + asked.tokens + 1)
    facts = {
        "model": Path(asked.model).name,
        "computed_in": "float32",
        "kv": "bfloat16",
        "tasks": asked.tasks,
        "prefix": asked.prefix,
        "tokens": asked.tokens,
        "chunk_size": asked.chunk_size,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for number, ids in enumerate(texts, 1):
        compare(model, ids, asked.prefix, asked.chunk_size, codecs, sums)
        result = {**facts, "documents": number, "codecs": figures(sums)}
        print(f"{number} of {len(texts)} documents", flush=True)
        if asked.output:
            asked.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{'codec':<10} {'size':>6} {'KL':>9} {'top-1':>7} {'perplexity':>10}")
    for codec, row in figures(sums).items():
        told = f"{row['size']:>6.3f} {row['kl']:>9.1e} {100 * row['top1']:>5.1f} % {100 * row['perplexity'] - 100:>+8.2f} %"
        print(f"{codec:<10} {told}")


if __name__ == "__main__":
    main()
