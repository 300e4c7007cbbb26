"""What all measurements share: the model, the prompt, a place for stores, and the watch on exactness."""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cake_hf.arithmetic.errors import CakeError
from cake_hf.arithmetic.report import Report, Span
from cake_hf.cache import CakeCache
from cake_hf.people.bench.models import plain_cache
from cake_hf.people.bench.settings import Settings
from cake_hf.stores.base import Store
from cake_hf.stores.local import LocalStore


class TokenClock:
    """Handed to `generate` as a streamer, notes when each token is there. The first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """A token, or the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """No more tokens."""


@dataclass(frozen=True)
class Run:
    """One call of `generate`.

    Attributes:
        seconds: wall time of the whole call.
        first_token_seconds: until the first new token was there.
        report: of the cache; an empty one for a plain cache.
    """

    seconds: float
    first_token_seconds: float
    report: Report

    def spans(self) -> list[Span]:
        """The chunks that the main thread made, in order, without the last piece and without forwards that were left."""
        return [span for span in self.report.timeline if span.outcome == "computed" and span.chunk >= 0]

    @property
    def tail_seconds(self) -> float:
        """S: what the prompt's last piece took."""
        return sum(span.end - span.start for span in self.report.timeline if span.chunk < 0)

    def parts(self) -> dict[str, float]:
        """Where the seconds of a restored prompt went; the parts add up to the whole.

        before: from the call to the first chunk's start (keys, lookup, buffers, thread starts);
        computing: the main thread's chunks; left: chunks it began that then came from the store; waiting: for loads, and
        whatever else is between the chunks;
        suffix: the prompt's last piece; outside: what `generate` does before and after.
        """
        tail = next(span for span in self.report.timeline if span.chunk < 0)
        first = min(span.start for span in self.report.timeline)
        computing = sum(span.end - span.start for span in self.spans())
        left = sum(span.end - span.start for span in self.report.timeline if span.outcome == "left")
        return {
            "before": first,
            "computing": computing,
            "left": left,
            "waiting": max(0.0, tail.start - first - computing - left),
            "suffix": tail.end - tail.start,
            "outside": self.seconds - tail.end,
        }


def median_parts(runs: Sequence[Run]) -> dict[str, float]:
    """The median of each part over the runs."""
    parts = [run.parts() for run in runs]
    return {name: statistics.median(part[name] for part in parts) for name in parts[0]}


@dataclass
class Parity:
    """Whether all runs gave the first token's logits bit for bit alike. The first run is what others are compared to.

    Attributes:
        checks: comparisons made.
        mismatches: what differed, and by how much.
    """

    checks: int = 0
    mismatches: list[str] = field(default_factory=list)
    _expected: torch.Tensor | None = field(default=None, repr=False)

    def check(self, logits: torch.Tensor, label: str) -> None:
        """Compare, or, the first time, remember."""
        if self._expected is None:
            self._expected = logits.clone()
            return
        self.checks += 1
        if not torch.equal(logits, self._expected):
            difference = (logits.double() - self._expected.double()).abs().max().item()
            self.mismatches.append(f"{label}: the first token's logits differ by up to {difference:g}")

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {"checks": self.checks, "mismatches": self.mismatches}


@dataclass
class Workbench:
    """One bench run's tools.

    Attributes:
        settings: of the run.
        model: with random weights.
        ids: `[1, tokens + suffix_tokens]`, the prompt.
        folder: where stores are made; removed by whoever made it.
        parity: watches all runs.
    """

    settings: Settings
    model: Any
    ids: torch.Tensor
    folder: Path
    parity: Parity = field(default_factory=Parity)
    _filled: LocalStore | None = field(default=None, repr=False)

    def cache(self, store: Store, *, strategy: str = "both", save: bool = False) -> CakeCache:
        """A new, empty cache on the store."""
        s = self.settings
        return CakeCache(self.model, store, chunk_size=s.chunk_size, strategy=strategy, save=save, limits=s.limits)

    def generate(self, cache: Any, label: str, *, new_tokens: int = 1, **options: Any) -> Run:
        """`model.generate` on the prompt with that cache, timed; the first token's logits are checked."""
        await_loaders()
        gc.collect()
        clock = TokenClock()
        begin = time.perf_counter()
        out = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            streamer=clock,
            **options,
        )
        end = time.perf_counter()
        self.parity.check(out.logits[0], label)
        report = cache.report if isinstance(cache, CakeCache) else Report()
        return Run(end - begin, clock.times[1] - begin, report)

    def plain_run(self, label: str = "plain", *, new_tokens: int = 1) -> Run:
        """transformers alone, on the same schedule of chunks: what every other run has to agree with."""
        size = self.settings.chunk_size
        return self.generate(plain_cache(self.model), label, new_tokens=new_tokens, prefill_chunk_size=size)

    def cake_run(self, store: Store, label: str, *, strategy: str = "both") -> Run:
        """A prompt through a fresh cache that reads from the store and saves nothing.

        Raises:
            CakeError: it did something else than its strategy says, so its time would mean nothing.
        """
        with self.cache(store, strategy=strategy) as cache:
            run = self.generate(cache, label, new_tokens=1)
        self._expect(run.report, strategy, label)
        return run

    def filled_store(self) -> LocalStore:
        """A store that has all chunks of the prompt. Made once, by a cold run that serves as warm-up, too."""
        if self._filled is None:
            self.plain_run()
            store = LocalStore(self.folder / "filled")
            with self.cache(store, save=True) as cache:
                report = self.generate(cache, "cold run").report
                cache.flush()
            if report.chunks_saved != self.settings.chunks:
                raise CakeError(f"Only {report.chunks_saved} of {self.settings.chunks} chunks were saved.")
            self._filled = store
        return self._filled

    def fresh_folder(self) -> Path:
        """An empty folder for a store."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def _expect(self, report: Report, strategy: str, label: str) -> None:
        chunks, loaded = self.settings.chunks, report.chunks_loaded
        wanted = {"compute": 0, "load": chunks}.get(strategy, loaded)
        if report.chunks_failed or loaded != wanted or loaded + report.chunks_computed != chunks:
            raise CakeError(
                f"{label}: {loaded} chunks loaded, {report.chunks_computed} computed, {report.chunks_failed} failed "
                f"of {chunks}. {report.reason}"
            )


def await_loaders() -> None:
    """A load that was overtaken may still be under way when its prompt is done; it shall not disturb the next timing."""
    for thread in threading.enumerate():
        if thread.name.startswith("cake-load"):
            thread.join()


def remove(folder: Path) -> None:
    """Delete a folder with what is in it."""
    shutil.rmtree(folder, ignore_errors=True)
