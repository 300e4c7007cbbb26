"""One question, answered in one way: the times of waiting by kind, and the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from cake_hf.report import Report
from demo.asking import ask
from eval.outcomes import digests

T = TypeVar("T")

COMPUTE, LOAD, COPY, WAIT = "compute", "load", "copy", "wait"
"""Kinds of work: forwards; bringing KV from a file or a store; copying it in memory; waiting, when the answer is there
already, for saving to end."""

_ANSWER = "answer"


@dataclass
class Clock:
    """Seconds that passed, by kind, and CPU seconds of all threads of this process in the same time."""

    laps: dict[str, float] = field(default_factory=dict)
    cpu: float = 0.0

    @contextmanager
    def lap(self, kind: str) -> Iterator[None]:
        """Counts the body's time under that kind."""
        begin, cpu = time.perf_counter(), time.process_time()
        yield
        self.laps[kind] = self.laps.get(kind, 0.0) + time.perf_counter() - begin
        self.cpu += time.process_time() - cpu

    def take(self, kind: str, work: Callable[[], T]) -> T:
        """Works like `lap`, for one call."""
        with self.lap(kind):
            return work()


@dataclass(frozen=True)
class Prepared:
    """A cache that holds the document's KV.

    Attributes:
        cache: of any kind.
        clock: the time it took.
        report: of our cache, about the document.
    """

    cache: Any
    clock: Clock = field(default_factory=Clock)
    report: Report = field(default_factory=Report)


@dataclass(frozen=True)
class Taken:
    """One answered question.

    Attributes:
        way: see `ways`.
        document: its number of tokens.
        round: from 0 on.
        question: 0 or 1.
        prepared: seconds by kind until the document's KV was there; empty if that is no step of its own, or was part of an
            earlier question.
        asked: seconds by kind from there to the first token.
        answered: seconds from there to the last token.
        after: seconds of waiting when the answer was there.
        cpu: seconds of all threads, for all of that.
        loaded, computed: chunks and tails of the document, in our cache.
        tokens: the generated ones.
        digests: of the logits that each token was chosen from; equal ones mean equal bits.
        text: the tokens as text.
        note: why our cache restored nothing, or empty.
    """

    way: str
    document: int
    round: int
    question: int
    prepared: dict[str, float]
    asked: dict[str, float]
    answered: float
    after: float
    cpu: float
    loaded: int
    computed: int
    tokens: list[int]
    digests: list[str]
    text: str
    note: str = ""

    @property
    def document_seconds(self) -> float:
        """Seconds until the document's KV was there."""
        return sum(self.prepared.values())

    @property
    def question_seconds(self) -> float:
        """Seconds from the question to the first token of its answer."""
        return sum(self.asked.values())

    @property
    def first_token(self) -> float:
        """Seconds to the first token, from nothing, or from what an earlier question has left."""
        return self.document_seconds + self.question_seconds

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values, rounded to what can be told apart."""
        plain = asdict(self)
        for name in ("answered", "after", "cpu"):
            plain[name] = round(plain[name], 4)
        for name in ("prepared", "asked"):
            plain[name] = {kind: round(seconds, 4) for kind, seconds in plain[name].items()}
        return plain


@dataclass(frozen=True)
class Asker:
    """Asks one model about one document.

    Attributes:
        model: loaded.
        tokenizer: of the model.
        prompts: `[1, tokens]` each: the document and a question.
        document: its number of tokens.
        tokens: of each answer. The model cannot end it earlier, so that equal work is compared.
        round: the current one.
    """

    model: Any
    tokenizer: Any
    prompts: tuple[torch.Tensor, ...]
    document: int
    tokens: int
    round: int = 0

    def ask(
        self,
        way: str,
        question: int,
        prepared: Prepared,
        *,
        copied: Callable[[Any], Any] | None = None,
        finish: Callable[[Any], object] | None = None,
        **options: Any,
    ) -> Taken:
        """Asks one question.

        Args:
            way, question: the one to ask.
            prepared: the cache, and what it took if that is to be told with this question.
            copied: makes the copy of the cache that the question is asked with.
            finish: called with the cache when the answer is there, and waited for.
            **options: of `generate`.
        """
        clock, cache = Clock(), prepared.cache
        if copied is not None:
            cache = clock.take(COPY, lambda: copied(prepared.cache))
        with clock.lap(_ANSWER):
            answer = ask(self.model, self.prompts[question], cache, self.tokens, min_new_tokens=self.tokens, **options)
        answered = sum(clock.laps.values())
        asked = {kind: clock.laps[kind] for kind in (COPY,) if kind in clock.laps} | {COMPUTE: answer.ttft}
        if finish is not None:
            clock.take(WAIT, lambda: finish(cache))
        report = prepared.report
        return Taken(
            *(way, self.document, self.round, question),
            prepared=dict(prepared.clock.laps),
            asked=asked,
            answered=answered,
            after=clock.laps.get(WAIT, 0.0),
            cpu=prepared.clock.cpu + clock.cpu,
            loaded=report.chunks_loaded + report.tails_loaded,
            computed=report.chunks_computed + report.tails_computed,
            tokens=answer.tokens.tolist(),
            digests=digests(answer),
            text=str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True)),
            note=report.reason,
        )
