"""Train the kernels of LESS (`cake_hf.presses.LESS`) for a model, layer by layer, on texts of one's own.

As in the paper each layer is trained alone: its attention with the state of evicted entries is to give what attention on all
entries gives. What is learnt is small (a few megabytes for a model of 135M parameters), and the model stays as it is.

    PYTHONPATH=src python training/train_less.py --model MODEL --data FOLDER --out less.safetensors
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cake_hf.layers.compat import named_for
from cake_hf.presses.less import Kernels, save_kernels
from cake_hf.presses.window import Recorded, record


@dataclass(frozen=True)
class Setting:
    """How the kernels are trained.

    Attributes:
        rank: numbers per evicted entry.
        hidden: width of the kernels.
        steps, rate: of the optimizer.
        queries: of each step.
        first, recent: entries that are kept; all others are evicted.
    """

    rank: int = 8
    hidden: int = 32
    steps: int = 150
    rate: float = 5e-3
    queries: int = 64
    first: int = 4
    recent: int = 128


@dataclass(frozen=True)
class Sample:
    """What one layer sees of one text."""

    recorded: Recorded
    keys: torch.Tensor
    values: torch.Tensor


def train(
    model: Any, texts: list[torch.Tensor], setting: Setting, seed: int = 0
) -> Iterator[tuple[Kernels, float, float]]:
    """Yields of each layer its kernels, and the relative error of attention with them and without (plain eviction).

    Args:
        model: the model.
        texts: token ids `[1, tokens]`.
        setting: see there.
        seed: of the first weights and the order of the texts.
    """
    torch.manual_seed(seed)
    chooser = random.Random(seed)
    seen = [_seen(model, ids, ids.shape[1] - setting.first - setting.recent) for ids in texts]
    for number in range(len(seen[0])):
        yield _train_layer([samples[number] for samples in seen], setting, chooser)


def _seen(model: Any, ids: torch.Tensor, queries: int) -> list[Sample]:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **named_for(model, cache))
    keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    recorded = record(model, keys, values, ids, queries)
    return [Sample(one, key, value) for one, key, value in zip(recorded, keys, values, strict=True)]


def _train_layer(samples: list[Sample], setting: Setting, chooser: random.Random) -> tuple[Kernels, float, float]:
    kernels = _calibrated(_begun(samples[0], setting), samples[0], setting)
    parts = [kernels.query_in, kernels.query_out, kernels.key_in, kernels.key_out, kernels.key_mix]
    for part in parts:
        part.requires_grad_()
    optimizer = torch.optim.Adam(parts, lr=setting.rate)
    for _ in range(setting.steps):
        sample = chooser.choice(samples)
        chosen = sorted(chooser.sample(range(sample.recorded.queries.shape[2]), setting.queries))
        loss, _ = _errors(kernels, sample, chosen, setting)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        final = [_errors(kernels, sample, range(0, sample.recorded.queries.shape[2], 4), setting) for sample in samples]
    return (
        Kernels(*(part.detach() for part in parts)),
        sum(float(with_it) for with_it, _ in final) / len(final),
        sum(float(without) for _, without in final) / len(final),
    )


def _begun(sample: Sample, setting: Setting) -> Kernels:
    queries, keys = sample.recorded.queries, sample.keys
    size = keys.shape[-1]

    def drawn(heads: int, *shape: int) -> torch.Tensor:
        return (torch.rand(heads, *shape) * 2 - 1) * (3 / sum(shape)) ** 0.5

    return Kernels(
        drawn(queries.shape[1], size, setting.hidden),
        drawn(queries.shape[1], setting.hidden, setting.rank),
        drawn(keys.shape[1], size, setting.hidden),
        drawn(keys.shape[1], setting.hidden, setting.rank),
        drawn(keys.shape[1], setting.rank, setting.rank),
    )


def _calibrated(kernels: Kernels, sample: Sample, setting: Setting) -> Kernels:
    """Scales the kernels of each key head so that what they add is, in the mean of its logarithm, as large as it is to be."""
    chosen = list(range(0, sample.recorded.queries.shape[2], 8))
    split = _split(kernels, sample, chosen, setting)
    right = split.products.masked_fill(~split.is_gone, float("-inf")).logsumexp(dim=-1)
    found = (
        (split.mapped_queries @ split.mapped_keys.transpose(-1, -2) * split.is_gone).sum(dim=-1).clamp_min(1e-20).log()
    )
    shift = (right - found)[0].mean(dim=-1).unflatten(0, (sample.keys.shape[1], -1)).mean(dim=-1)
    return Kernels(
        kernels.query_in,
        kernels.query_out,
        kernels.key_in,
        kernels.key_out,
        kernels.key_mix * shift.exp()[:, None, None],
    )


@dataclass(frozen=True)
class _Split:
    products: torch.Tensor
    is_gone: torch.Tensor
    is_kept: torch.Tensor
    mapped_queries: torch.Tensor
    mapped_keys: torch.Tensor
    values: torch.Tensor


def _split(kernels: Kernels, sample: Sample, chosen: Any, setting: Setting) -> _Split:
    queries = sample.recorded.queries[:, :, list(chosen)].float()
    groups = queries.shape[1] // sample.keys.shape[1]
    tokens = sample.keys.shape[2]
    places = torch.tensor(list(chosen))[:, None] + tokens - sample.recorded.queries.shape[2]
    numbers = torch.arange(tokens)[None]
    is_kept = (numbers <= places) & ((numbers < setting.first) | (numbers > places - setting.recent))
    keys = sample.keys.float().repeat_interleave(groups, dim=1)
    return _Split(
        products=queries @ keys.transpose(-1, -2) * sample.recorded.attention.scaling,
        is_gone=(numbers <= places) & ~is_kept,
        is_kept=is_kept,
        mapped_queries=kernels.of_queries(queries),
        mapped_keys=kernels.of_keys(sample.keys).repeat_interleave(groups, dim=1),
        values=sample.values.float().repeat_interleave(groups, dim=1),
    )


def _errors(kernels: Kernels, sample: Sample, chosen: Any, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the relative errors of attention with the state, and with kept entries alone."""
    split = _split(kernels, sample, chosen, setting)
    hidden = float("-inf")
    right = split.products.masked_fill(~(split.is_kept | split.is_gone), hidden).softmax(dim=-1) @ split.values
    kept = split.products.masked_fill(~split.is_kept, hidden)
    added = split.mapped_queries @ split.mapped_keys.transpose(-1, -2) * split.is_gone
    total = torch.logaddexp(kept.logsumexp(dim=-1), added.sum(dim=-1).clamp_min(1e-20).log())[..., None]
    found = ((kept - total).exp() + added * (-total).exp()) @ split.values
    alone = kept.softmax(dim=-1) @ split.values
    return (found - right).norm() / right.norm(), (alone - right).norm() / right.norm()


def read_texts(folder: Path, tokenizer: Any, count: int, tokens: int) -> list[torch.Tensor]:
    """Returns the first tokens of documents in LongBench's files (`gov_report`, `qasper`), which the evaluation leaves out."""
    found = []
    for name in ("gov_report", "qasper"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines[: count // 2]:
            ids = tokenizer(json.loads(line)["context"], return_tensors="pt", verbose=False).input_ids[:, :tokens]
            found.append(ids)
    return [ids for ids in found if ids.shape[1] == tokens]


def main() -> None:
    """Trains the kernels of a model and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="a folder with LongBench's gov_report.jsonl and qasper.jsonl"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    asked = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    texts = read_texts(asked.data, AutoTokenizer.from_pretrained(asked.model), asked.texts, asked.tokens)
    started, kernels = time.monotonic(), []
    for number, (layer, error, without) in enumerate(train(model, texts, Setting(steps=asked.steps))):
        kernels.append(layer)
        print(
            f"layer {number}: error {error:.3f}, {without:.3f} without, {time.monotonic() - started:.0f} s", flush=True
        )
    save_kernels(asked.out, kernels)


if __name__ == "__main__":
    main()
