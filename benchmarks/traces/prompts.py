"""A trace as token ids for a model that runs here: blocks become chunks, and each block's tokens follow from its number."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.traces.requests import Request, Trace
from benchmarks.traces.stored import hits_of


@dataclass(frozen=True)
class Scale:
    """How a trace is made smaller.

    Attributes:
        chunk_size: tokens of a chunk; each stands for a block of the trace.
        divide: so many blocks of the trace are one chunk, so that long prompts become short enough.
        most: chunks of a prompt at most; the blocks after them are left out.
    """

    chunk_size: int
    divide: int = 1
    most: int = 64

    def smaller(self, trace: Trace) -> Trace:
        """Returns the trace with fewer blocks and tokens, in the same order and with the same sharing.

        Of several blocks the last one names the chunk: it is shared exactly if all of them are.
        """
        return Trace(trace.name, tuple(self._request(one, trace.block) for one in trace.requests), self.chunk_size)

    def _request(self, request: Request, block: int) -> Request:
        blocks = request.blocks[self.divide - 1 :: self.divide][: self.most]
        rest = request.tokens - len(blocks) * block * self.divide
        suffix = max(1, min(rest * self.chunk_size // (block * self.divide), self.chunk_size))
        return Request(request.time, blocks, len(blocks) * self.chunk_size + suffix, request.output)


@dataclass(frozen=True)
class Prompt:
    """One request as the model gets it.

    Attributes:
        ids: `[1, tokens]`.
        hits: tokens of it that earlier prompts have stored.
    """

    ids: torch.Tensor
    hits: int


def prompts_of(trace: Trace, vocabulary: Sequence[int]) -> Iterator[Prompt]:
    """Returns the prompts of a trace that was made smaller.

    Args:
        trace: its blocks are chunks.
        vocabulary: token ids to choose from.
    """
    for number, (request, hits) in enumerate(zip(trace.requests, hits_of(trace), strict=True)):
        rest = request.tokens - len(request.blocks) * trace.block
        pieces = [random_tokens(f"block {block}", trace.block, vocabulary) for block in request.blocks]
        ids = [token for piece in [*pieces, random_tokens(f"request {number}", rest, vocabulary)] for token in piece]
        yield Prompt(torch.tensor([ids]), hits * trace.block)


def random_tokens(name: str, count: int, vocabulary: Sequence[int]) -> list[int]:
    """Returns the tokens of that name, the same each time."""
    return random.Random(name).choices(vocabulary, k=count)


def vocabulary_of(model: Any) -> list[int]:
    """Returns the token ids that prompts are made of: all but those that the model's configurations call special."""
    special: set[int] = set()
    for config in (model.config.get_text_config(), model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            special.update(value if isinstance(value, list) else [value] if value is not None else [])
    return [token for token in range(model.config.get_text_config().vocab_size) if token not in special]
