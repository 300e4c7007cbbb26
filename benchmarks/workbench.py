"""The tools that all measurements share: the model, the prompt, a place for stores, and the check of exactness."""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.settings import Settings
from cake_hf.cache import CakeCache
from cake_hf.errors import CakeError
from cake_hf.layers.compat import for_generate, plain_cache
from cake_hf.limits import Limits
from cake_hf.report import Report, Span
from cake_hf.restore.session import Session
from cake_hf.scheduling.frontier import Strategy
from cake_hf.stores.base import Store
from cake_hf.stores.local import LocalStore
from cake_hf.stores.memory import MemoryStore
from cake_hf.testing import Rules

FLUSH_SECONDS = 600.0
"""Seconds within which a full store must be durable."""


class TokenClock:
    """Notes when each token arrives; passed to `generate` as a streamer. The first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Notes a token, or the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing: there are no more tokens."""


@dataclass(frozen=True)
class Run:
    """One call of `generate`.

    Attributes:
        seconds: wall time of the whole call.
        first_token_seconds: until the first new token.
        report: of the cache; an empty one for a plain cache.
    """

    seconds: float
    first_token_seconds: float
    report: Report

    def spans(self) -> list[Span]:
        """The chunks that the main thread made, in order, without the suffix and without preempted forwards."""
        return [span for span in self.report.timeline if span.outcome == "computed" and span.chunk >= 0]

    @property
    def tail_seconds(self) -> float:
        """S: the time of the prompt's suffix."""
        return sum(span.end - span.start for span in self.report.timeline if span.chunk < 0)

    def parts(self) -> dict[str, float]:
        """Returns the seconds of each part of a restored prompt; the parts add up to the whole.

        before: from the call to the first chunk's start (keys, lookup, buffers, thread starts);
        computing: the main thread's chunks; left: preempted forwards, whose chunks came from the store; waiting: for loads,
        and whatever else is between the chunks;
        suffix: the prompt's suffix; outside: what `generate` does before and after.
        """
        tail = next(span for span in self.report.timeline if span.chunk < 0)
        first = min(span.start for span in self.report.timeline)
        computing = sum(span.end - span.start for span in self.spans())
        left = sum(span.end - span.start for span in self.report.timeline if span.outcome == "preempted")
        return {
            "before": first,
            "computing": computing,
            "preempted": left,
            "waiting": max(0.0, tail.start - first - computing - left),
            "suffix": tail.end - tail.start,
            "outside": self.seconds - tail.end,
        }


def median_parts(runs: Sequence[Run]) -> dict[str, float]:
    """Returns the median of each part over the runs."""
    parts = [run.parts() for run in runs]
    return {name: statistics.median(part[name] for part in parts) for name in parts[0]}


@dataclass
class Parity:
    """Whether all runs gave the first token's logits bit for bit alike. The first run is what others are compared to.

    Attributes:
        checks: comparisons made.
        mismatches: the differences, and how large they are.
        roundings: runs that round differently by their nature (one big forward), whose bits are not compared.
        same_tokens: those of them with the same first token.
    """

    checks: int = 0
    mismatches: list[str] = field(default_factory=list)
    roundings: int = 0
    same_tokens: int = 0
    _expected: torch.Tensor | None = field(default=None, repr=False)

    def check(self, logits: torch.Tensor, label: str) -> None:
        """Compares the logits; the first ones are remembered."""
        if self._expected is None:
            self._expected = logits.clone()
            return
        self.checks += 1
        if not torch.equal(logits, self._expected):
            difference = (logits.double() - self._expected.double()).abs().max().item()
            self.mismatches.append(f"{label}: the first token's logits differ by up to {difference:g}")

    def note_rounding(self, logits: torch.Tensor) -> None:
        """Counts a run whose logits need not be equal, and whether its first token is."""
        if self._expected is not None:
            self.roundings += 1
            self.same_tokens += bool(torch.equal(logits.argmax(-1), self._expected.argmax(-1)))

    def as_dict(self) -> dict[str, object]:
        """Returns JSON-ready values."""
        single = {"one_forward_runs": self.roundings, "with_the_same_token": self.same_tokens} if self.roundings else {}
        return {"checks": self.checks, "mismatches": self.mismatches, **single}


@dataclass
class Workbench:
    """One bench run's tools.

    Attributes:
        settings: of the run.
        model: with random weights.
        ids: `[1, tokens + suffix_tokens]`, the prompt.
        folder: for stores; removed by the caller that made it.
        parity: watches all runs.
    """

    settings: Settings
    model: Any
    ids: torch.Tensor
    folder: Path
    parity: Parity = field(default_factory=Parity)
    _filled: LocalStore | None = field(default=None, repr=False)

    def cache(
        self,
        store: Store,
        *,
        strategy: str = "both",
        save: bool = False,
        limits: Limits | None = None,
        rules: Rules | None = None,
    ) -> CakeCache:
        """Returns a new, empty cache on the store."""
        s = self.settings
        return CakeCache(
            self.model,
            store,
            chunk_size=s.chunk_size,
            strategy=strategy,
            save=save,
            limits=limits or s.limits,
            rules=rules,
        )

    def session(self, store: Store, *, chunk_size: int | None = None) -> Session:
        """Returns the session behind a cache on the store, for a look at its parts; it saves nothing. The caller closes it."""
        s = self.settings
        return Session(
            self.model,
            store,
            chunk_size=chunk_size or s.chunk_size,
            salt="",
            save=False,
            exact=True,
            strategy=Strategy.BOTH,
            limits=s.limits,
        )

    def generate(self, cache: Any, label: str, *, new_tokens: int = 1, **options: Any) -> Run:
        """Times `model.generate` on the prompt with that cache; the first token's logits are checked."""
        return self.timed(lambda: cache, label, new_tokens=new_tokens, **options)

    def timed(
        self, make_cache: Callable[[], Any], label: str, *, new_tokens: int = 1, exact: bool = True, **options: Any
    ) -> Run:
        """Works like `generate`, with a cache whose creation belongs to the timed part.

        Args:
            make_cache: returns the cache.
            label: names the run if its logits differ.
            new_tokens: to generate.
            exact: the first token's logits must be those of the other runs, bit for bit.
            **options: of `model.generate`.
        """
        await_loaders()
        gc.collect()
        clock = TokenClock()
        synchronize(self.settings.device)
        begin = time.perf_counter()
        cache = make_cache()
        out = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            **for_generate(self.model, cache),
            max_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            streamer=clock,
            **options,
        )
        synchronize(self.settings.device)
        end = time.perf_counter()
        if exact:
            self.parity.check(out.logits[0], label)
        else:
            self.parity.note_rounding(out.logits[0])
        report = cache.report if isinstance(cache, CakeCache) else Report()
        return Run(end - begin, clock.times[1] - begin, report)

    def plain_run(self, label: str = "plain", *, new_tokens: int = 1) -> Run:
        """Runs transformers alone, on the same schedule of chunks: every other run must agree with it."""
        size = self.settings.chunk_size
        return self.generate(plain_cache(self.model), label, new_tokens=new_tokens, prefill_chunk_size=size)

    def one_forward_run(self, label: str) -> Run:
        """Runs transformers alone, the whole prompt in one forward: it rounds differently from chunks, so bits are not
        compared."""
        return self.timed(lambda: plain_cache(self.model), label, exact=False)

    def cake_run(self, store: Store, label: str, *, strategy: str = "both", rules: Rules | None = None) -> Run:
        """Runs a prompt through a new cache that reads from the store and saves nothing.

        Raises:
            CakeError: it did something else than its strategy says, so its time would mean nothing.
        """
        with self.cache(store, strategy=strategy, rules=rules) as cache:
            run = self.generate(cache, label, new_tokens=1)
        self._expect(run.report, strategy, label)
        return run

    def filled_store(self) -> LocalStore:
        """Returns a store that has all chunks of the prompt. Made once, by a cold run that serves as warm-up, too."""
        if self._filled is None:
            self.plain_run()
            store = LocalStore(self.folder / "filled", budget=None)
            with self.cache(store, save=True, limits=self._room_for_all()) as cache:
                report = self.generate(cache, "cold run").report
                cache.flush()
            if report.chunks_saved != self.settings.chunks:
                raise CakeError(f"Only {report.chunks_saved} of {self.settings.chunks} chunks were saved.")
            self._filled = store
        return self._filled

    def chunk_bytes(self) -> int:
        """Bytes of one chunk at rest."""
        store = self.filled_store()
        return store.size(next(store.keys())) or 0

    def shorter(self, tokens: int) -> Workbench:
        """Returns a bench for the first `tokens` of this one's prompt; a prompt's chunks are also those of its beginning."""
        settings = replace(self.settings, tokens=tokens)
        ids = self.ids[:, : tokens + settings.suffix_tokens]
        return Workbench(settings, self.model, ids, self.folder, _filled=self.filled_store())

    def fresh_folder(self) -> Path:
        """Makes an empty folder for a store."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def _room_for_all(self) -> Limits:
        """Returns limits under which no chunk stays unsaved because the disk is slower than the model."""
        with closing(self.session(MemoryStore())) as session:
            payload = session.bound_model.layout().nbytes * self.settings.chunks
        limits = self.settings.limits
        return replace(limits, save_queue_bytes=max(limits.save_queue_bytes, payload), exit_flush_seconds=FLUSH_SECONDS)

    def _expect(self, report: Report, strategy: str, label: str) -> None:
        chunks, loaded = self.settings.chunks, report.chunks_loaded
        wanted = {"compute": 0, "load": chunks}.get(strategy, loaded)
        if report.chunks_failed or loaded != wanted or loaded + report.chunks_computed != chunks:
            raise CakeError(
                f"{label}: {loaded} chunks loaded, {report.chunks_computed} computed, {report.chunks_failed} failed "
                f"of {chunks}. {report.reason}"
            )


def await_loaders() -> None:
    """Waits for superseded loads, which may be under way when their prompt is done, so that they do not disturb the next
    timing."""
    for thread in threading.enumerate():
        if thread.name.startswith("cake-load"):
            thread.join()


@contextmanager
def cheap_collections() -> Iterator[None]:
    """Keeps collections in the body from looking through existing objects again (libraries above all)."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def synchronize(device: str) -> None:
    """Waits for a GPU's queued work, which goes on after a call has returned."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def remove(folder: Path) -> None:
    """Deletes a folder and its content."""
    shutil.rmtree(folder, ignore_errors=True)
