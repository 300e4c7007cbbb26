"""Times one `generate`: the arrival of the first token, and the logits that every token was chosen from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.generation.streamers import BaseStreamer

from cake_hf.cache import CakeCache
from cake_hf.layers.compat import for_generate, plain_cache
from cake_hf.report import Report, Span

_TENSORS = "answer.safetensors"
_FACTS = "answer.json"


@dataclass(frozen=True)
class Answer:
    """The result of one `generate`.

    Attributes:
        tokens: `[new]` generated ids.
        logits: `[new, vocabulary]`, raw.
        ttft: seconds from the call to the first token.
        report: of the cache; empty for a `DynamicCache`.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    ttft: float
    report: Report = field(default_factory=Report)

    def same_logits(self, other: Answer) -> bool:
        """Whether the logits are the same bit for bit (stricter than equal numbers: 0 is not -0)."""
        return (
            self.logits.dtype == other.logits.dtype
            and self.logits.shape == other.logits.shape
            and torch.equal(self.logits.view(torch.uint8), other.logits.view(torch.uint8))
        )

    def save(self, folder: Path) -> None:
        """Writes it to a folder from which another process reads it; no pickle."""
        save_file({"tokens": self.tokens, "logits": self.logits}, folder / _TENSORS)
        (folder / _FACTS).write_text(json.dumps({"ttft": self.ttft, "report": self.report.as_dict()}))

    @classmethod
    def load(cls, folder: Path) -> Answer:
        """Reads what `save` wrote."""
        tensors, facts = load_file(folder / _TENSORS), json.loads((folder / _FACTS).read_text())
        spans = [Span(*span) for span in facts["report"].pop("timeline")]
        return cls(tensors["tokens"], tensors["logits"], facts["ttft"], Report(**facts["report"], timeline=spans))


class FirstToken(BaseStreamer):  # type: ignore[misc]  # transformers is not typed for us
    """Notes when the first new token came; `generate` hands a streamer the prompt, then each token."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._pieces, self._clock = 0, clock
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._pieces += 1
        if self._pieces == 2:
            self.at = self._clock()

    def end(self) -> None:
        """Does nothing: there are no more tokens."""


def ask(
    model: Any,
    ids: torch.Tensor,
    cache: Any,
    new_tokens: int,
    *,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> Answer:
    """Generates greedily and takes the time.

    Args:
        model: a causal language model.
        ids: `[1, tokens]` of the prompt.
        cache: a new `CakeCache` or `DynamicCache`.
        new_tokens: the most tokens to generate.
        clock: returns seconds; those of the processor on a machine with other work.
        **options: more arguments of `generate`.
    """
    streamer, ids = FirstToken(clock), ids.to(model.device)
    begin = clock()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **for_generate(model, cache),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=streamer,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    tokens = output.sequences[0, ids.shape[1] :].cpu().contiguous()
    logits = torch.cat(output.logits).cpu().contiguous()
    return Answer(tokens, logits, streamer.at - begin, getattr(cache, "report", None) or Report())


def ask_plainly(model: Any, ids: torch.Tensor, new_tokens: int, chunk_size: int) -> Answer:
    """Runs the oracle: transformers alone, with the same cut of the prompt."""
    return ask(model, ids, plain_cache(model), new_tokens, prefill_chunk_size=chunk_size)


def ask_with_store(model: Any, ids: torch.Tensor, new_tokens: int, cache: CakeCache) -> Answer:
    """Runs with a `CakeCache`, which it closes; what was computed is durable when this returns."""
    with cache:
        answer = ask(model, ids, cache, new_tokens)
        cache.flush()
    return answer


def warm_up(model: Any, ids: torch.Tensor, chunk_size: int) -> None:
    """Generates a few tokens of another prompt, so that starting up the libraries is not counted."""
    other = ids[:, : chunk_size + 1].flip(1)
    ask_plainly(model, other, 2, chunk_size)
