"""An engine on a virtual clock: computing counts by the processor time of its thread, and loads arrive one behind the other.

The engine's steps are made in the caller's thread. Where nothing can be run, the clock goes on to the next load or request.
What a background thread would do beside the steps (looking up, reading, checking) takes no time on it; the generation thread's
own part of saving does. With `StepCosts`, steps take what a formula says, and nothing else takes time: two runs are then alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from cake_hf.limits import Limits
from cake_hf.report import Report
from cake_hf.serving.ledger import Load
from cake_hf.serving.loads import Loaders
from cake_hf.serving.manager import BatchingManager
from cake_hf.serving.restore import Restore

POLL = 0.1
"""Seconds after which an engine with nothing to run looks again what it can do, as transformers has it."""


class Arrival(NamedTuple):
    """A request that comes at a certain time."""

    at: float
    name: str
    ids: list[int]


@dataclass(frozen=True)
class StepCosts:
    """What steps take, by a formula. The defaults are about those of the small model on one core.

    Attributes:
        base: seconds of any step.
        token: seconds per token.
        pair: seconds per token and token that it is compared with, masked or not.
    """

    base: float = 8e-3
    token: float = 2.1e-4
    pair: float = 7.6e-8

    def seconds(self, outputs: Any) -> float:
        """Returns what the step takes that these inputs are prepared for."""
        tokens, compared = outputs.num_q_tokens, max(outputs.total_seqlen_k.values())
        return float(self.base + tokens * (self.token + self.pair * compared))


@dataclass
class Run:
    """What one run gave.

    Attributes:
        span: seconds until the last answer was complete.
        idle: seconds in which nothing could be run.
        steps: number of steps.
        ttft: seconds from arrival to first token, by request.
        gaps: seconds between two tokens of an answer.
        answers: tokens, by request.
        reports: of the requests.
    """

    span: float = 0.0
    idle: float = 0.0
    steps: int = 0
    ttft: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)


PATIENCE = 600.0
"""Seconds after which a load counts as late."""


class SerialLoaders(Loaders):
    """Loads without threads: up to two are under way, and one arrives every `interval` seconds of the virtual clock.

    As threads would, a load that ends while a step runs makes room for the next one at once.
    """

    interval = 0.0
    most = 2

    def set_up(self, interval: float) -> None:
        """Starts with nothing under way."""
        self.interval = interval
        self._line = 0.0
        self._under_way: list[tuple[float, Restore, Load]] = []
        self._reader = self.new_reader()

    def _start(self) -> None:
        """Claims what can be claimed."""
        while len(self._under_way) < self.most and (claimed := self._claim()) is not None:
            self._line = max(self._line, self._clock()) + self.interval
            self._under_way.append((self._line, *claimed))

    def pump(self, clock: VirtualClock) -> None:
        """Brings what has arrived by now."""
        now = clock.now()
        while self._under_way and self._under_way[0][0] <= now:
            at, restore, load = self._under_way.pop(0)
            with clock.frozen(at):
                self._count(restore, load, self._load(restore, load, self._reader))
                self._start()

    def next_event(self) -> float | None:
        """When the next load arrives; None if none is under way."""
        return self._under_way[0][0] if self._under_way else None


class VirtualClock:
    """Seconds of processor time of this thread, and of waiting that was skipped.

    Args:
        measures: whether processor time counts; else only what is skipped does.
    """

    def __init__(self, *, measures: bool = True) -> None:
        self._worked = time.thread_time if measures else float
        self._base = self._worked()
        self.skipped = 0.0
        self._frozen: float | None = None

    def now(self) -> float:
        """Returns the seconds since the start."""
        if self._frozen is not None:
            return self._frozen
        return float(self._worked() - self._base + self.skipped)

    def skip_to(self, when: float) -> None:
        """Goes on to a moment at which something happens."""
        self.skipped += max(0.0, when - self.now())

    @contextmanager
    def frozen(self, at: float | None = None) -> Iterator[None]:
        """Lets the work of another thread take no time; it happens at that moment."""
        outside, begin = self._frozen, self._worked()
        self._frozen = self.now() if at is None else at
        try:
            yield
        finally:
            self._frozen = outside
            if outside is None:
                self._base += self._worked() - begin


class VirtualManager(BatchingManager):
    """A manager whose engine runs on a virtual clock; see `run`.

    Args:
        model, store, options: as for `BatchingManager`.
        interval: seconds between the arrivals of two loads.
        costs: of steps; None to measure them.
    """

    step_clock = staticmethod(time.thread_time)

    def __init__(
        self, model: Any, store: Any, *, interval: float = 0.0, costs: StepCosts | None = None, **options: Any
    ) -> None:
        self.virtual, self._interval, self._costs = VirtualClock(measures=costs is None), interval, costs
        # No load fails here, and with a larger model one may take longer than a prompt would wait for.
        super().__init__(model, store, limits=Limits(read_timeout=PATIENCE), **options)

    def clock(self) -> float:
        return self.virtual.now()

    def loaders_for(self, layout: Any, blocks: Any, windows: Any) -> Loaders:
        device = torch.device("cpu")
        loaders = SerialLoaders(
            self._session.bound_store, layout, blocks, windows, self._beliefs, device, self.wake, self.clock
        )
        loaders.set_up(self._interval)
        return loaders

    def believe(self, chunks: Sequence[float]) -> None:
        """Starts with what earlier prompts would have taught: seconds of each chunk, and of a load."""
        for index, seconds in enumerate(chunks):
            self._beliefs.saw_chunk(index, seconds)
        self._beliefs.saw_arrival(self._interval)

    def _generation_step(self) -> None:
        before = self.stepped_seconds
        super()._generation_step()
        if self._costs is not None and self.batch_processor is not None:
            took = self._costs.seconds(self.batch_processor.inputs_and_outputs)
            self.virtual.skip_to(self.virtual.now() + took)
            self.stepped_seconds = before + took

    def _await_comparisons(self) -> None:
        """Waits for the audit's reads, which are of another thread."""
        for restore in self._requests.under_way():
            for comparison in restore.comparisons:
                while not comparison.is_over():
                    time.sleep(0.001)

    def run(self, arrivals: Sequence[Arrival], new: int) -> Run:
        """Answers all requests with `new` tokens each."""
        self.batch_processor = processor = self._create_batch_processor()
        loaders: Any = self._loaders
        later, run, clock = sorted(arrivals), Run(), self.virtual
        tokens: dict[str, list[float]] = {}
        clock.__init__(measures=self._costs is None)  # type: ignore[misc]  # the engine is ready
        with torch.no_grad():
            while later or processor.has_pending_requests() or not self.input_queue.empty():
                with clock.frozen():
                    while later and later[0].at <= clock.now():
                        one = later.pop(0)
                        self.add_request(one.ids, request_id=one.name, max_new_tokens=new)
                    self._requests.desk.wait(PATIENCE)
                    if loaders is not None:
                        loaders.pump(clock)
                        self._await_comparisons()
                if not processor.prepare_next_batch():
                    comes = loaders.next_event() if loaders is not None else None
                    looks_again = clock.now() + POLL if loaders is not None else None
                    if events := [at for at in (later[0].at if later else None, comes, looks_again) if at is not None]:
                        before = clock.skipped
                        clock.skip_to(min(events))
                        run.idle += clock.skipped - before
                    continue
                batch = processor.inputs_and_outputs.requests_in_batch
                before_step = {one.state.request_id: len(one.state.generated_tokens) for one in batch}
                self._generation_step()
                processor.update_batch()
                run.steps += 1
                for one in batch:
                    if len(one.state.generated_tokens) > before_step[one.state.request_id]:
                        tokens.setdefault(one.state.request_id, []).append(clock.now())
        came = {one.name: one.at for one in arrivals}
        run.span = max(times[-1] for times in tokens.values())
        run.ttft = {name: times[0] - came[name] for name, times in tokens.items()}
        run.gaps = [b - a for times in tokens.values() for a, b in pairwise(times)]
        while not self.output_router.output_queue.empty():
            answer = self.output_router.output_queue.get()
            run.answers[answer.request_id] = list(answer.generated_tokens)
        run.reports = {one.name: report for one in arrivals if (report := self.report(one.name)) is not None}
        return run
