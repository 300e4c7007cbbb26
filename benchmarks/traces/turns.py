"""SCBench's form: several questions about one document (Li et al., ICLR 2025); each method's score and TTFT, turn by turn.

A method is a function `(model, document, turns) -> Answered`, registered under its name:

    @method("my compression")
    def mine(model, document, turns): ...

It gets the document's token ids, `[1, tokens]`, and for each turn what follows the document in its prompt (earlier questions
with their right answers, and its own question). The time of bringing the document belongs to the first turn.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from cake_hf import CakeCache
from cake_hf.layers.compat import cache_name, forward_of, plain_cache
from cake_hf.scheduling.planner import auto_chunk_size
from demo.asking import ask

T = TypeVar("T")

CLOCK: ContextVar[Callable[[], float]] = ContextVar("clock", default=time.monotonic)
"""Returns seconds: those that passed, or those of the processor, which other programs on the machine change less."""


@dataclass(frozen=True)
class Turn:
    """One question.

    Attributes:
        ids: `[1, tokens]`, what follows the document in the prompt.
        new_tokens: most tokens of the answer.
    """

    ids: torch.Tensor
    new_tokens: int


@dataclass(frozen=True)
class Answered:
    """What a method made of one document.

    Attributes:
        answers: token ids, turn by turn.
        ttfts: seconds to the first token of each turn; the first one includes bringing the document.
    """

    answers: tuple[tuple[int, ...], ...]
    ttfts: tuple[float, ...]


Method = Callable[[Any, torch.Tensor, Sequence[Turn]], Answered]

METHODS: dict[str, Method] = {}


def method(name: str) -> Callable[[Method], Method]:
    """Registers a method under that name.

    Raises:
        ValueError: there is one of that name.
    """

    def register(function: Method) -> Method:
        if name in METHODS:
            raise ValueError(f"There is a method {name!r} already.")
        METHODS[name] = function
        return function

    return register


@method("computed anew")
def computed_anew(model: Any, document: torch.Tensor, turns: Sequence[Turn]) -> Answered:
    """Each prompt is computed whole by transformers, in our chunks."""
    steps = Steps(make=lambda _: plain_cache(model), options={"prefill_chunk_size": auto_chunk_size(model.device.type)})
    return steps.run(model, document, turns)


@method("DynamicCache, copied")
def recipe(model: Any, document: torch.Tensor, turns: Sequence[Turn]) -> Answered:
    """transformers' recipe: a cache that holds the document is copied for each question."""
    return Steps(bring=lambda: _computed(model, document), make=copy.deepcopy).run(model, document, turns)


@method("cake_hf, cold")
def cold(model: Any, document: torch.Tensor, turns: Sequence[Turn]) -> Answered:
    """The store is empty at first: the first turn computes and saves, each later one restores in a new cache."""
    with tempfile.TemporaryDirectory(prefix="cake-turns-") as store:
        return _from_store(model, store, document).run(model, document, turns)


@method("cake_hf, warm")
def warm(model: Any, document: torch.Tensor, turns: Sequence[Turn]) -> Answered:
    """The document was stored before; each turn restores it from the disk in a new cache."""
    with tempfile.TemporaryDirectory(prefix="cake-turns-") as store:
        prefilled(model, store, document).close()
        return _from_store(model, store, document).run(model, document, turns)


@method("cake_hf, in memory")
def in_memory(model: Any, document: torch.Tensor, turns: Sequence[Turn]) -> Answered:
    """The document was stored before; the first turn restores it, and each question is asked on a copy of that cache."""
    with tempfile.TemporaryDirectory(prefix="cake-turns-") as store:
        prefilled(model, store, document).close()
        steps = Steps(bring=lambda: prefilled(model, store, document), make=copy.deepcopy, end=CakeCache.close)
        return steps.run(model, document, turns)


def _nothing(*_: Any) -> None:
    """Brings nothing, or leaves things as they are."""


@dataclass(frozen=True)
class Steps:
    """How a method that goes on with `generate` answers; a method may well do without this.

    Attributes:
        bring: brings the document, before the first turn; its time counts for that.
        make: returns the cache of one turn from what was brought; its time counts.
        after: what is done with it after the answer; not counted.
        end: what is done with what was brought, in the end.
        options: more arguments of `generate`.
    """

    make: Callable[[Any], Any]
    bring: Callable[[], Any] = _nothing
    after: Callable[[Any], object] = _nothing
    end: Callable[[Any], object] = _nothing
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: Any, document: torch.Tensor, turns: Sequence[Turn]) -> Answered:
        """Returns the answers to all turns."""
        held, bringing = timed(self.bring)
        answers, ttfts = [], []
        try:
            for number, turn in enumerate(turns):
                cache, preparing = timed(lambda: self.make(held))
                prompt = torch.cat([document, turn.ids], dim=1)
                answer = ask(model, prompt, cache, turn.new_tokens, clock=CLOCK.get(), **self.options)
                self.after(cache)
                answers.append(tuple(answer.tokens.tolist()))
                ttfts.append(answer.ttft + preparing + (0.0 if number else bringing))
        finally:
            self.end(held)
        return Answered(tuple(answers), tuple(ttfts))


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Returns what the work gave, and its seconds."""
    clock = CLOCK.get()
    begin = clock()
    done = work()
    return done, clock() - begin


def _from_store(model: Any, store: str, document: torch.Tensor) -> Steps:
    return Steps(make=lambda _: prefilled(model, store, document), after=CakeCache.close)


def prefilled(model: Any, store: str, document: torch.Tensor) -> CakeCache:
    """Returns a cache with a document from the store, or computed and to be stored."""
    cache = CakeCache(model, store)
    cache.prefill(document)
    return cache


@torch.inference_mode()
def _computed(model: Any, document: torch.Tensor) -> Any:
    cache = plain_cache(model)
    named = {cache_name(forward_of(model)): cache}
    model(document, attention_mask=torch.ones_like(document), logits_to_keep=1, **named)
    return cache
