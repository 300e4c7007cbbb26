"""Continuous batching on a tiny model: as transformers runs it, with a store, and step by step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from cake_hf import Report, Store, generate_batch
from cake_hf.layers.compat import is_older_than
from models import CHUNK, build, prompt, shared_model
from waiting import PATIENCE

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)

needs_engine = pytest.mark.skipif(is_older_than("5.20"), reason="restoring in continuous batching needs 5.20")

CHUNKS = 6
NEW = 5

DOCUMENT: list[int] = prompt(CHUNK * CHUNKS + 5)[0].tolist()
SHORT: list[list[int]] = [prompt(tokens, seed=tokens)[0].tolist() for tokens in (13, 3, 9)]
COMPANY = [SHORT[0], DOCUMENT, *SHORT[1:]]


def generation(new: int = NEW) -> Any:
    """Greedy answers of that many tokens."""
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)


def engine_config(page: int = CHUNK, blocks: int = 64, **options: Any) -> Any:
    """A small engine: that many blocks of `page` tokens, and steps of at most 64 tokens."""
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(page_size=page, num_blocks=blocks, **{"max_batch_tokens": 64, **options})


def plain(model: Any, prompts: Sequence[Sequence[int]], new: int = NEW, **config: Any) -> list[list[int]]:
    """The answers of transformers' own engine."""
    found = model.generate_batch(
        list(prompts),
        generation_config=generation(new),
        continuous_batching_config=engine_config(**config),
        warmup=False,
    )
    return [answer.generated_tokens for answer in found.values()]


@cache
def plain_company(dtype: str = "float32") -> list[list[int]]:
    """The answers to `COMPANY` of transformers' own engine."""
    return plain(shared_model("llama", dtype), COMPANY)


def served(
    model: Any, prompts: Sequence[Sequence[int]], store: Store, new: int = NEW, *, engine: Any = None, **options: Any
) -> tuple[list[list[int]], list[Report]]:
    """The answers, and the reports, of an engine with a store."""
    reports: dict[str, Report] = {}
    found = generate_batch(
        model,
        prompts,
        store=store,
        report=reports.update,
        generation_config=generation(new),
        continuous_batching_config=engine or engine_config(),
        warmup=False,
        **{"chunk_size": CHUNK, **options},
    )
    return [answer.generated_tokens for answer in found.values()], [reports[name] for name in found]


class Stepper:
    """An engine with a store whose steps the test makes, in its own thread.

    Args:
        model: to run.
        store: with chunks, or for them.
        new: tokens of each answer.
        engine: the engine's configuration.
        options: of the manager.
    """

    def __init__(self, model: Any, store: Any, new: int = NEW, *, engine: Any = None, **options: Any) -> None:
        from cake_hf.serving.manager import BatchingManager

        self.manager = BatchingManager(
            model,
            store,
            generation_config=generation(new),
            continuous_batching_config=engine or engine_config(),
            **{"chunk_size": CHUNK, **options},
        )
        self.manager.batch_processor = self.processor = self.manager._create_batch_processor()
        self.engine: Any = self.manager._engine
        self.answers: dict[str, Any] = {}
        self.steps: list[list[str]] = []

    def add(self, name: str, ids: Sequence[int], **options: Any) -> None:
        """Adds a request, and waits until it has been looked up."""
        assert self.manager.add_request(list(ids), request_id=name, **options) == name
        assert self.manager._requests.desk.wait(PATIENCE)

    def step(self) -> bool:
        """Makes a step, if there is anything to run; checks that no memory is lost."""
        with torch.no_grad():
            ran = bool(self.processor.prepare_next_batch())
            if ran:
                batch = self.processor.inputs_and_outputs.requests_in_batch
                self.steps.append([future.state.request_id for future in batch])
                self.manager._generation_step()
                self.processor.update_batch()
        self.check_memory()
        while not self.manager.output_router.output_queue.empty():
            answer = self.manager.output_router.output_queue.get()
            self.answers[answer.request_id] = answer
        return ran

    def check_memory(self) -> None:
        """Every block is free, in a request's table, or kept to be found again; and in one of these only."""
        account = self.engine.account()
        assert account["free"] + account["tables"] + account["cached"] == account["all"], account

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Makes steps until there is nothing left, or something has come to pass."""
        deadline = time.monotonic() + PATIENCE
        while self.processor.has_pending_requests() or not self.manager.input_queue.empty():
            if until is not None and until():
                return
            if not self.step():
                self.manager._wake_up_loop.wait(0.05)
                self.manager._wake_up_loop.clear()
            assert time.monotonic() < deadline, "the engine does not come to an end"
        assert until is None or until()

    def kv(self, name: str, chunks: int) -> list[torch.Tensor]:
        """A copy of the KV of a request's chunks in memory: keys and values of each layer, as bytes in order."""
        pieces = len(self.manager._session.bound_model.layout().pieces)
        blocks = self.engine.parts(name, 0, chunks * CHUNK, pieces)
        return [torch.cat([block[piece] for block in blocks]).clone() for piece in range(pieces)]

    def tokens(self, name: str) -> list[int]:
        """The answer to a request that is done."""
        answer = self.answers[name]
        assert answer.error is None, answer.error
        return list(answer.generated_tokens)

    def close(self) -> None:
        """Closes the manager."""
        self.manager.close()
        self.manager.batch_processor = None


@contextmanager
def stepping(model: Any, store: Any, **options: Any) -> Iterator[Stepper]:
    """A `Stepper`, closed at the end."""
    stepper = Stepper(model, store, **options)
    try:
        yield stepper
    finally:
        stepper.close()


@cache
def generated_kv(dtype: str = "float32", chunks: int = CHUNKS) -> list[torch.Tensor]:
    """The KV of `DOCUMENT`'s chunks as `generate(prefill_chunk_size=CHUNK)` makes it, in the form of `Stepper.kv`."""
    from transformers import DynamicCache

    from naming import given

    model: Any = build("llama", dtype)
    kept = DynamicCache(config=model.config)
    model.generate(
        torch.tensor([DOCUMENT]),
        prefill_chunk_size=CHUNK,
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        **given(kept),
    )
    pieces = [tensor for layer in kept.layers for tensor in (layer.keys, layer.values)]
    return [one[0, :, : chunks * CHUNK].transpose(0, 1).contiguous().view(torch.uint8).reshape(-1) for one in pieces]


def whole(steps: Stepper) -> bool:
    """Whether all memory is free, but for what is kept to be found again."""
    return bool(steps.engine.account()["tables"] == 0)


def is_restored(steps: Stepper, name: str = "document") -> bool:
    """Whether all chunks of a request's prompt are there, and it has blocks."""
    report = steps.manager.report(name)
    assert report is not None
    state = steps.engine.active().get(name)
    return report.restored == CHUNKS and state is not None and state.position_offset >= CHUNKS * CHUNK


def alike(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    """Whether two lists of bytes are equal."""
    return len(one) == len(other) and all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))
