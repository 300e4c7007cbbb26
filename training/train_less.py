"""Train the kernels of LESS (`cake_hf.presses.LESS`) for a model, layer by layer, on texts of one's own.

As in the paper each layer is trained alone: its attention with the state of evicted entries is to give what attention on all
entries gives. The entries are evicted as the press evicts them: of the beginning of a text, at one of several budgets; the
queries are those of the text that follows. What is learnt is small (a few megabytes for a model of 135M parameters), and the
model stays as it is.

    PYTHONPATH=src python training/train_less.py --model MODEL --data FOLDER --out less.safetensors
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cake_hf.layers.compat import named_for
from cake_hf.presses.less import Kernels, kept_entries, save_kernels
from cake_hf.presses.window import Recorded, record


@dataclass(frozen=True)
class Setting:
    """How the kernels are trained.

    Attributes:
        rank: numbers per evicted entry.
        hidden: width of the kernels.
        steps, rate: of the optimizer.
        queries: of each step.
        keeps: budgets, as `keep` of `LESS`; each step takes one of them.
        first, window: as for `LESS`.
    """

    rank: int = 8
    hidden: int = 32
    steps: int = 300
    rate: float = 5e-3
    queries: int = 64
    keeps: tuple[float, ...] = (0.25, 0.1)
    first: int = 4
    window: int = 32


@dataclass(frozen=True)
class Sample:
    """What one layer sees of one text.

    Attributes:
        recorded: the queries of its second half.
        keys, values: of the whole text.
    """

    recorded: Recorded
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def before(self) -> int:
        """Tokens before the recorded queries."""
        return int(self.keys.shape[2] - self.recorded.queries.shape[2])

    def queries(self, start: int, end: int) -> Recorded:
        """Returns the recorded queries of some tokens of the text."""
        return replace(self.recorded, queries=self.recorded.queries[:, :, start - self.before : end - self.before])


@dataclass(frozen=True)
class Case:
    """A text whose beginning is pressed; the queries are those of the tokens behind it.

    Attributes:
        sample: the text.
        cut: tokens that are pressed.
        keep: the budget.
    """

    sample: Sample
    cut: int
    keep: float


def train(
    model: Any, texts: list[torch.Tensor], setting: Setting, seed: int = 0
) -> Iterator[tuple[Kernels, float, float]]:
    """Yields of each layer its kernels, and the relative error of attention with them and without (plain eviction).

    Args:
        model: the model.
        texts: token ids `[1, tokens]`, of at least `2 * (setting.window + setting.queries)` tokens.
        setting: see there.
        seed: of the first weights, and of the texts, cuts and budgets of the steps.
    """
    torch.manual_seed(seed)
    chooser = random.Random(seed)
    seen = [_seen(model, ids) for ids in texts]
    for number in range(len(seen[0])):
        yield _train_layer([samples[number] for samples in seen], setting, chooser)


def _seen(model: Any, ids: torch.Tensor) -> list[Sample]:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **named_for(model, cache))
    keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    recorded = record(model, keys, values, ids, ids.shape[1] // 2)
    return [Sample(one, key, value) for one, key, value in zip(recorded, keys, values, strict=True)]


def _train_layer(samples: list[Sample], setting: Setting, chooser: random.Random) -> tuple[Kernels, float, float]:
    last = [Case(one, one.keys.shape[2] - setting.queries, keep) for one in samples for keep in setting.keeps]
    kernels = _calibrated(_begun(samples[0], setting), last[0], setting)
    parts = [kernels.query_in, kernels.query_out, kernels.key_in, kernels.key_out, kernels.key_mix]
    for part in parts:
        part.requires_grad_()
    optimizer = torch.optim.Adam(parts, lr=setting.rate)
    for _ in range(setting.steps):
        loss, _ = _errors(kernels, _drawn(samples, setting, chooser), setting)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        final = [_errors(kernels, case, setting) for case in last]
    return (
        Kernels(*(part.detach() for part in parts)),
        sum(float(with_it) for with_it, _ in final) / len(final),
        sum(float(without) for _, without in final) / len(final),
    )


def _drawn(samples: list[Sample], setting: Setting, chooser: random.Random) -> Case:
    sample = chooser.choice(samples)
    cut = chooser.randint(sample.before + setting.window, sample.keys.shape[2] - setting.queries)
    return Case(sample, cut, chooser.choice(setting.keeps))


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


def _calibrated(kernels: Kernels, case: Case, setting: Setting) -> Kernels:
    """Scales the kernels of each key head so that what they add is, in the mean of its logarithm, as large as it is to be."""
    split = _split(kernels, case, setting)
    right = split.products.masked_fill(~split.is_gone, float("-inf")).logsumexp(dim=-1)
    found = split.added.sum(dim=-1).clamp_min(1e-20).log()
    shift = (right - found)[0].mean(dim=-1).unflatten(0, (case.sample.keys.shape[1], -1)).mean(dim=-1)
    return replace(kernels, key_mix=kernels.key_mix * shift.exp()[:, None, None])


@dataclass(frozen=True)
class _Split:
    """The queries behind a cut and all entries of the text; each but `values` is `[1, query heads, queries, tokens]`.

    Attributes:
        products: scaled, of queries and keys.
        is_gone, is_kept: evicted entries, and those that the query sees.
        added: what the state adds for evicted entries, in place of `exp(products)`.
        values: `[1, query heads, tokens, head_dim]`.
    """

    products: torch.Tensor
    is_gone: torch.Tensor
    is_kept: torch.Tensor
    added: torch.Tensor
    values: torch.Tensor


def _split(kernels: Kernels, case: Case, setting: Setting) -> _Split:
    sample, cut, end = case.sample, case.cut, case.cut + setting.queries
    queries = sample.queries(cut, end).queries.float()
    groups = queries.shape[1] // sample.keys.shape[1]
    keys, values = sample.keys[:, :, :end], sample.values[:, :, :end].float().repeat_interleave(groups, dim=1)
    window = sample.queries(cut - setting.window, cut)
    in_prefix, _ = kept_entries(window, keys[:, :, :cut], case.keep, setting.first)
    in_prefix = in_prefix.repeat_interleave(groups, dim=0)[None, :, None].expand(*queries.shape[:3], cut)
    behind = torch.ones(setting.queries, setting.queries, dtype=torch.bool).tril().expand(*queries.shape[:3], -1)
    is_gone = torch.cat([~in_prefix, torch.zeros_like(behind)], dim=-1)
    mapped = kernels.of_queries(queries) @ kernels.of_keys(keys).repeat_interleave(groups, dim=1).transpose(-1, -2)
    return _Split(
        products=queries
        @ keys.float().repeat_interleave(groups, dim=1).transpose(-1, -2)
        * sample.recorded.attention.scaling,
        is_gone=is_gone,
        is_kept=torch.cat([in_prefix, behind], dim=-1),
        added=mapped * is_gone,
        values=values,
    )


def _errors(kernels: Kernels, case: Case, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the relative errors of attention with the state, and with kept entries alone."""
    split = _split(kernels, case, setting)
    hidden = float("-inf")
    right = split.products.masked_fill(~(split.is_kept | split.is_gone), hidden).softmax(dim=-1) @ split.values
    kept = split.products.masked_fill(~split.is_kept, hidden)
    total = torch.logaddexp(kept.logsumexp(dim=-1), split.added.sum(dim=-1).clamp_min(1e-20).log())[..., None]
    found = ((kept - total).exp() + split.added * (-total).exp()) @ split.values
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


def text_options(description: str | None, *, texts: int, tokens: int) -> argparse.ArgumentParser:
    """Returns a parser for the options of a script that runs a model on texts, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="a folder with LongBench's gov_report.jsonl and qasper.jsonl"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=texts)
    parser.add_argument("--tokens", type=int, default=tokens)
    return parser


def main() -> None:
    """Trains the kernels of a model and writes them."""
    parser = text_options(__doc__, texts=8, tokens=1024)
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
