"""Is restoring exact on this device? Compares with a chunked `DynamicCache`, bit for bit: logits of all new tokens, and all
KV.

The runs are a cold prompt, each strategy warm, every meeting point of the two sides (set by a gate), and stores that drop,
cut, flip, fail and hang. No timing is involved, so this works on any machine at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.loading import Chunks
from benchmarks.workbench import Workbench, await_loaders
from cake_hf import reads_only
from cake_hf.errors import CakeError
from cake_hf.layers.compat import LinearAttentionLayer, for_generate, plain_cache
from cake_hf.layers.recurrent import states_of
from cake_hf.limits import Limits
from cake_hf.stores.base import Store
from cake_hf.stores.local import LocalStore
from cake_hf.testing import FaultStore, GateStore, expected_faults
from cake_hf.util.redaction import shown

CHUNKS = 8
NEW_TOKENS = 4
FAULT_SEEDS = range(4)
HANGING_SECONDS = 0.5
"""Seconds after which a load that hangs is given up."""


@dataclass
class Exactness:
    """What was tried, and what differed.

    Attributes:
        tried: names of the runs.
        wrong: one sentence each.
    """

    tried: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Returns JSON-ready values."""
        return {"runs": len(self.tried), "tried": self.tried, "wrong": self.wrong}


@dataclass(frozen=True)
class _Outcome:
    logits: torch.Tensor
    kv: list[torch.Tensor]

    def difference(self, other: _Outcome) -> str:
        """Returns the first difference; empty if there is none."""
        if not torch.equal(self.logits, other.logits):
            return "the logits differ"
        unequal = (n for n, pair in enumerate(zip(self.kv, other.kv, strict=True)) if not torch.equal(*pair))
        number = next(unequal, None)
        return "" if number is None else f"KV tensor {number} differs"


def runs_of(chunks: int) -> int:
    """Returns how many runs an `Examination` has for a prompt of that many chunks."""
    return 3 + (chunks - 1) + 2 * len(FAULT_SEEDS) + 2


class Examination:
    """The runs, one after the other.

    Args:
        bench: its prompt should be short: every meeting point is a run.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._store = bench.filled_store()
        self._expected = self._generate(plain_cache(bench.model), prefill_chunk_size=bench.settings.chunk_size)
        self.found = Exactness()
        self._left_alone = False  # the last run restored nothing, so no gate would be reached

    def steps(self) -> Iterator[str]:
        """Does one run after the other; yields the name of each before it."""
        with expected_faults():
            yield from self._steps()

    def _steps(self) -> Iterator[str]:
        for name, store, options in self._plain_runs():
            yield name
            self._try(name, store, **options)
        for meeting in range(1, self._bench.settings.chunks):
            yield (name := f"meeting at chunk {meeting}")
            self._try_meeting(name, meeting)
        for strategy in ("both", "load"):
            for seed in FAULT_SEEDS:
                yield (name := f"{strategy}, faults of seed {seed}")
                self._try(name, FaultStore(self._store, rate=0.5, seed=seed), strategy=strategy)
        for strategy in ("both", "load"):
            yield (name := f"{strategy}, a load that hangs")
            self._try_hanging(name, strategy)

    def _plain_runs(self) -> Iterator[tuple[str, Store, dict[str, Any]]]:
        yield "cold, saving", LocalStore(self._bench.fresh_folder(), budget=None), {"save": True}
        yield "warm, both", self._store, {}
        yield "warm, load", self._store, {"strategy": "load"}

    def _try(self, name: str, store: Store, meeting: int | None = None, **options: Any) -> None:
        """Runs once through a new cache and notes any difference."""
        self.found.tried.append(name)
        try:
            with self._bench.cache(store, **options) as cache, _met_at(self._bench, store, meeting):
                wrong = self._generate(cache).difference(self._expected)
                report = cache.report
            self._left_alone = not report.restored
            if not wrong and report.chunks_computed + report.chunks_loaded != self._bench.settings.chunks:
                wrong = f"not all chunks were restored ({report.reason})"
            if not wrong and meeting is not None and report.chunks_computed != meeting:
                wrong = f"the two sides met at chunk {report.chunks_computed}"
        except (CakeError, TimeoutError, RuntimeError) as error:
            wrong = f"{type(error).__name__}: {shown(error)}"
        if wrong:
            self.found.wrong.append(f"{name}: {wrong}")

    def _try_meeting(self, name: str, meeting: int) -> None:
        gate = GateStore(self._store)
        # One loader: a second one would hold the chunk before the meeting point.
        limits = replace(self._bench.settings.limits, loader_threads=1)
        try:
            if self._left_alone:
                gate.open()
            self._try(name, gate, None if self._left_alone else meeting, limits=limits)
        finally:
            gate.open()
            await_loaders()

    def _try_hanging(self, name: str, strategy: str) -> None:
        store = FaultStore(self._store, {Chunks.of(self._bench).keys[-1]: "stall"})
        limits = Limits(read_timeout=HANGING_SECONDS)
        try:
            self._try(name, store, strategy=strategy, limits=limits)
            if strategy == "load" and not store.injected:
                self.found.wrong.append(f"{name}: no load did")
        finally:
            store.release()
            await_loaders()

    def _generate(self, cache: Any, **options: Any) -> _Outcome:
        ids = self._bench.ids
        out = self._bench.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **for_generate(self._bench.model, cache),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        return _Outcome(torch.stack(out.logits), [tensor.clone() for tensor in kept_in(cache)])


def kept_in(cache: Any) -> Iterator[torch.Tensor]:
    """All tensors that a cache's layers keep, in order: keys and values, an indexer's keys, recurrent states."""
    for layer in cache.layers:
        named = (getattr(layer, name, None) for name in ("keys", "values", "indexer_keys"))
        yield from (tensor for tensor in named if isinstance(tensor, torch.Tensor))
        if isinstance(layer, LinearAttentionLayer):
            yield from states_of(layer).values()


@contextmanager
def _met_at(bench: Workbench, gate: Store, meeting: int | None) -> Iterator[None]:
    """Lets all later chunks, and no others, be read while chunk `meeting - 1` is being computed.

    The cache must exist before: its hook on the model must come first, so that the chunks counted here are its own.
    """
    if meeting is None or not isinstance(gate, GateStore):
        yield
        return
    forwards, later = 0, bench.settings.chunks - meeting
    # Recurrent states are values beside the chunks. Each is read by a thread of its own, among the first.
    states = sum(1 for _ in gate.keys()) - bench.settings.chunks  # noqa: SIM118  # a store is no mapping

    def before(module: torch.nn.Module, args: object, kwargs: object) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == meeting:
            gate.await_begun(states + 1)
            gate.open(states + later)
            # This chunk's contested load: by then the one loader has settled the others.
            gate.await_begun(states + later + 1)

    handle = bench.model.register_forward_pre_hook(reads_only(before), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
