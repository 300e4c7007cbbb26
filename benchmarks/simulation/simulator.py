"""Whole restores on a virtual clock: the frontier and the planner as they are, in settings that no machine here has.

One thread plays all parts. Loaders are events on a clock that moves only when something is waited for, so a simulated hour
takes no time, and the same setting always gives the same outcome. What stands in for the world:

- Computing chunk i takes `f_i / s` seconds, s the share of the device. A forward is left at a layer's border only.
- One line brings one read after the other, each in `bytes / bandwidth` seconds; a read ends `latency` after its bytes
  came off the line. (As in `cake_hf.testing.ThrottledStore`.) The last chunks are read in ranges of layers where that pays,
  and the prompt's last piece runs through its layers as they come.
- Encoded chunks have fewer bytes on the line, come whole, and their loader then decodes them. Where decoding shares its
  cores with computing, that much less is computed meanwhile.
- All else (checks, copies, locks, waking up) takes no time. So what is lost here is lost by the decisions alone.

Source of the policy that is compared with: Cake (Jin et al., ICML 2025, arXiv 2410.03065).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from heapq import heappop, heappush
from itertools import accumulate
from types import TracebackType
from typing import Literal

from benchmarks.simulation.speeds import CONSTANT, Speed
from cake_hf.limits import STAGED_PER_THREAD
from cake_hf.report import Span
from cake_hf.scheduling.adapting import Adapting
from cake_hf.scheduling.costs import MAX_SECONDS, Brought, CodecCost, Costs, LoadCost
from cake_hf.scheduling.frontier import Frontier, Judge, Strategy
from cake_hf.scheduling.frontier import Outcome as LoadOutcome
from cake_hf.scheduling.layer_gate import LayerGate, ranges_of
from cake_hf.scheduling.learning import CostLearner
from cake_hf.scheduling.pace import Pace

Policy = Literal["both", "compute", "load", "cake", "fixed"]
"""What is simulated: the three strategies of the library; the paper's own policy as a reference; and "fixed", which meets in
the middle with beliefs that a restore does not correct, and tries nothing: it shows what correcting and trying gain."""

MAX_CHUNKS = 100_000
MAX_LAYERS = 10_000
MAX_CORES = 10_000


@dataclass(frozen=True)
class Setting:
    """One prompt, whose full chunks are stored, on one machine.

    Attributes:
        compute: f_i, seconds to compute chunk i with the whole device. For a straight line see `steps`.
        chunk_bytes: S, bytes of one raw chunk.
        bandwidth: bytes per second of the line, shared by all loads.
        latency: seconds added to each read.
        threads: loader threads.
        layers: of the model; a forward can be left at so many places.
        suffix: S, seconds to compute the prompt's last piece with the whole device.
        gpu_share: s, the part of the device that computing gets, above 0 to 1; f_i and S are divided by it.
        costs_known: whether both single methods were measured before. If not, it is the first prompt ever.
        most_staged: the most chunks that are staged at a time; None for what a restore does (STAGED_PER_THREAD per thread).
        read_timeout: seconds until a load that is waited for is given up. No load fails here, so by default never.
        holes: chunks that are not stored.
        compute_speed: how it changes while the restore runs, beside the share.
        line_speed: likewise.
        codec: of the stored chunks; None if they are raw.
        cores: on which chunks are computed and decoded; decoding one then takes `S / (D * cores)` seconds from computing. 0 if
            computing has a device of its own.
        forms: in which each chunk is stored, the finest first, if a load may choose; then `codec` is not used.
        max_ttft: seconds after which the first token should be there; loads choose by it (see `scheduling.adapting`).

    Raises:
        ValueError: a number is out of range or not a number.
    """

    compute: tuple[float, ...]
    chunk_bytes: float
    bandwidth: float
    latency: float = 0.0
    threads: int = 2
    layers: int = 32
    suffix: float = 0.0
    gpu_share: float = 1.0
    costs_known: bool = True
    most_staged: int | None = None
    read_timeout: float = math.inf
    holes: tuple[int, ...] = ()
    compute_speed: Speed = CONSTANT
    line_speed: Speed = CONSTANT
    codec: CodecCost | None = None
    cores: int = 0
    forms: tuple[CodecCost, ...] = ()
    max_ttft: float = math.inf

    def __post_init__(self) -> None:
        _ = self.line
        _check("number of chunks", len(self.compute), 1, MAX_CHUNKS)
        _check("number of layers", self.layers, 1, MAX_LAYERS)
        _check("part of the device", self.gpu_share, 1e-6, 1)
        _check("number of staged chunks", self.most_staged or 0, 0, MAX_CHUNKS)
        _check("deadline of a read", self.read_timeout, 1e-9, math.inf)
        _check("number of cores", self.cores, 0, MAX_CORES)
        _check("time to the first token", self.max_ttft, 0, math.inf)
        _check("suffix's seconds", self.suffix / self.gpu_share, 0, MAX_SECONDS)
        for seconds in self.compute:
            _check("seconds to compute a chunk", seconds / self.gpu_share, 1e-9, MAX_SECONDS)

    @property
    def chunks(self) -> int:
        """n, full chunks of the prompt."""
        return len(self.compute)

    @property
    def step_seconds(self) -> list[float]:
        """f_i / s, seconds that computing chunk i takes here."""
        return [seconds / self.gpu_share for seconds in self.compute]

    @property
    def suffix_seconds(self) -> float:
        """S / s, seconds that computing the prompt's last piece takes here."""
        return self.suffix / self.gpu_share

    @property
    def line(self) -> LoadCost:
        """What loading takes here. Its `finish(k)` is exact: all threads start at 0 and nothing else is on the line."""
        raw = LoadCost(self.latency, self.bandwidth, self.chunk_bytes, self.threads)
        return raw if self.codec is None else self.codec.load(raw)

    def brought(self, codec: CodecCost | None) -> Brought:
        """What a load brings of a chunk in that form."""
        raw = round(self.chunk_bytes)
        if codec is None:
            return Brought(raw, raw)
        return Brought(max(1, round(codec.ratio * raw)), raw, self.chunk_bytes / codec.speed)


@dataclass(frozen=True)
class Outcome:
    """What one simulated restore came to.

    Attributes:
        seconds: to the first token: until the two ends have met and the prompt's last piece is through.
        computed, loaded: chunks; together all of them.
        left: forwards that were left because their chunk had arrived.
        spans: who did which chunk from when to when, as in a report's timeline.
        reads: which chunk's bytes were on the line from when to when.
        forms: of the loaded chunks, by number in `Setting.forms`; empty if loads have no choice.
    """

    seconds: float
    computed: int
    loaded: int
    left: int
    spans: tuple[Span, ...]
    reads: tuple[tuple[int, float, float], ...] = ()
    forms: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One setting under all policies. All times are seconds to the first token.

    Attributes:
        both: T, what the library takes.
        compute, load: Tc and Tl, the single methods.
        cake: what the paper's policy takes.
        best: T*, the least that any token-wise split could take.
        outcome: of T.
    """

    both: float
    compute: float
    load: float
    cake: float
    best: float
    outcome: Outcome

    @property
    def eta(self) -> float:
        """`T* / T`: 1 is perfect."""
        return self.best / self.both

    @property
    def sigma(self) -> float:
        """`T / Tc + T / Tl`: 1 is the best for chunks that all cost the same to compute."""
        return self.both / self.compute + self.both / self.load

    @property
    def ratio(self) -> float:
        """`T / min(Tc, Tl)`: above 1 is slower than the better single method."""
        return self.both / min(self.compute, self.load)


def steps(chunks: int, base: float, slope: float = 0.0) -> tuple[float, ...]:
    """f_i = base + slope * i, in seconds: the compute costs of Cake's model.

    Args:
        chunks: n.
        base: seconds of the first chunk.
        slope: seconds that each further chunk costs more than the one before it.
    """
    _check("number of chunks", chunks, 1, MAX_CHUNKS)
    return tuple(base + slope * index for index in range(chunks))


def evaluate(setting: Setting) -> Cell:
    """All policies in one setting."""
    costs = _learned(setting)
    compute, load = simulate(setting, "compute"), _Restore(setting, "load", costs).run()
    outcome = _Restore(setting, "both", costs).run()
    return Cell(
        both=outcome.seconds,
        compute=compute.seconds,
        load=load.seconds,
        cake=simulate(setting, "cake").seconds,
        best=best_seconds(setting),
        outcome=outcome,
    )


def simulate(setting: Setting, strategy: Policy) -> Outcome:
    """One restore.

    Args:
        setting: where it happens.
        strategy: "both", "compute" or "load" are the library's own. "cake" is the paper's policy: after each step it asks
            whether the next chunk is already there and otherwise computes it, however soon it would come; no cost model,
            and no forward is left.

    Raises:
        ValueError: there is no such strategy.
    """
    if strategy not in ("both", "compute", "load", "cake", "fixed"):
        raise ValueError(f"The strategy must be both, compute, load, cake or fixed, got {strategy!r}.")
    knows = strategy in ("both", "load", "fixed")
    return _Restore(setting, strategy, _learned(setting) if knows else Costs()).run()


def best_seconds(setting: Setting) -> float:
    """T*, the least time of any token-wise split whose last piece comes after all else:
    `min over m of max(f_0 + ... + f_(m-1), L(n - m)) + S`, and with holes what `planner.plan` says.

    L(k) is when k loads have ended, `k * l` where there is no latency (Jin et al., ICML 2025; see `cells.optimum`). No
    order of computing and loading is faster: the chunks that are computed are the first m, one after the other, and the
    n - m others are loads over the same line. (Running the last piece beside the last loads may be: eta then exceeds 1.)
    """
    seconds, finish = setting.step_seconds, setting.line.finish
    fronts = list(accumulate(seconds, initial=0.0))
    best, loads, behind = fronts[-1], 0, 0.0
    for m in reversed(range(setting.chunks)):
        if m in setting.holes:
            behind += seconds[m]
        else:
            loads += 1
            best = min(best, max(fronts[m], finish(loads)) + behind)
    return best + setting.suffix_seconds


def best_after(setting: Setting, outcome: Outcome, when: float) -> float:
    """The least time to the first token that was still possible at a moment of a restore, the speeds to come being known.

    As `best_seconds`, of the chunks that were neither computed nor loaded by then; what was half done counts, and reads add no
    latency. So it may be a little less than possible.

    Args:
        setting: of the restore.
        outcome: of it.
        when: seconds from its start.
    """
    if setting.codec is not None or setting.forms:
        raise ValueError("What was still possible is known for raw chunks only.")
    there = {span.chunk for span in outcome.spans if span.end <= when and span.outcome != "preempted"}
    compute, load = list(setting.step_seconds), [setting.chunk_bytes / setting.bandwidth] * setting.chunks
    for chunk in there:
        compute[chunk] = load[chunk] = 0.0
    for span in outcome.spans:
        if span.actor == "compute" and span.start < when < span.end:
            compute[span.chunk] -= setting.compute_speed.work(span.start, when)
    for chunk, start, end in outcome.reads:
        if start < when and chunk not in there:
            load[chunk] -= setting.line_speed.work(start, min(end, when))
    fronts = [setting.compute_speed.end(when, max(0.0, work)) for work in accumulate(compute, initial=0.0)]
    backs = [setting.line_speed.end(when, max(0.0, work)) for work in accumulate(reversed(load), initial=0.0)]
    return setting.compute_speed.end(min(map(max, fronts, reversed(backs))), setting.suffix_seconds)


def simulate_prompts(
    settings: Sequence[Setting], learner: CostLearner, policy: Literal["both", "fixed"] = "both"
) -> list[Outcome]:
    """Restores one after the other, each with the costs that were learnt from those before it.

    Args:
        settings: one per prompt.
        learner: what is believed at first; it learns on.
        policy: of all of them.
    """
    outcomes = []
    for setting in settings:
        size = round(setting.chunk_bytes)
        costs = learner.costs(size if setting.codec is None else None)
        restore = _Restore(setting, policy, costs, learner.credit)
        outcome = restore.run()
        learner.saw_restore(restore.pace, outcome.spans, size, restore.brought)
        outcomes.append(outcome)
    return outcomes


@lru_cache(maxsize=1)  # several policies are asked about one setting after the other
def _learned(setting: Setting) -> Costs:
    """What is believed."""
    size = round(setting.chunk_bytes) if setting.codec is None else None
    return learnt(setting).costs(size) if setting.costs_known else Costs()


def learnt(setting: Setting) -> CostLearner:
    """What was learnt from a prompt that was all computed and one that was all loaded, at speed 1."""
    learner = CostLearner()
    learner.saw_steps(list(enumerate(setting.step_seconds)))
    whole = replace(setting, line_speed=CONSTANT, compute_speed=CONSTANT, holes=())
    first = _Restore(replace(whole, forms=()), "load", Costs()).run()
    spans = [(span.start, span.end) for span in first.spans]
    learner.saw_loads(round(setting.chunk_bytes), spans, [setting.brought(setting.codec)] * len(spans))
    return learner


class _Clock:
    """Seconds that pass only when somebody waits; what was planned for the time that passes then happens, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def __call__(self) -> float:
        return self.now

    @property
    def next(self) -> float:
        """When the next thing happens; infinite if nothing will."""
        return self._planned[0][0] if self._planned else math.inf

    def plan(self, when: float, action: Callable[[], None]) -> None:
        """Let something happen; of what is planned for one moment, what was planned first happens first."""
        self._count += 1
        heappush(self._planned, (when, self._count, action))

    def step(self) -> None:
        """Go to the next thing that happens."""
        self.now, _, action = heappop(self._planned)
        action()

    def go_to(self, when: float) -> None:
        """Let time pass, with all that happens up to and at that moment."""
        while self.next <= when:
            self.step()
        self.now = when


class _Changed:
    """Stands in for a `threading.Condition`: there is one thread, so the lock is nothing and waiting lets time pass."""

    def __init__(self, clock: _Clock, notified: Callable[[], None]) -> None:
        self._clock = clock
        self._notified = False
        self._when_notified = notified

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        end = self._clock.now + (math.inf if timeout is None else timeout)
        self._notified = False
        while not self._notified and self._clock.next <= end:
            if self._clock.next == math.inf:
                raise RuntimeError("The simulated main thread waits for what will never happen.")
            self._clock.step()
        if not self._notified:
            self._clock.now = end
        return self._notified

    def notify_all(self) -> None:
        self._notified = True
        self._when_notified()


class _CakesOwn(Judge):
    """It loads all, and computes whatever is not there when it asks."""

    def slack(self, front: int, chunk: int, loads: int, now: float) -> float:
        return 1.0


class _Fixed(Pace):
    """What it believed at first it believes to the end. Loads that are late are expected to be late by as much again."""

    def saw_forward(self, chunk: int, seconds: float, share: float = 1.0, *, worked: float | None = None) -> None:
        super().saw_forward(chunk, seconds, share)
        self._factor = 1.0

    def tries(self, chunk: int, loads_left: int, now: float) -> bool:
        return False

    def _wait(self, left: int, now: float) -> float | None:
        if self._load is None or left < 1 or not self._arrivals:
            return None
        done = len(self._arrivals) - 1
        return abs(self._load.finish(done + left) - self._load.finish(done) - (now - self._arrivals[-1]))

    def _lateness(self, now: float) -> float:
        return 1.0


class _Restore:
    """One restore: the main thread's walk is `run`, loader threads are events. Mirrors `restore.py` and `loader.py`."""

    def __init__(self, setting: Setting, policy: Policy, costs: Costs, credit: float = 0.0) -> None:
        self._setting = setting
        self._policy = policy
        self._clock = _Clock()
        self._line_free_at = 0.0
        self._spans: list[Span] = []
        self._reads: list[tuple[int, float, float]] = []
        self._left = 0
        self._ranges = ranges_of(costs, setting.layers, setting.latency)
        self._idle: list[str] = []  # loaders that found nothing to load
        self._computes = False
        self._taken = 0.0  # seconds that decoding took from computing
        self.brought: dict[int, Brought] = {}
        self._forms: dict[int, int] = {}
        self.pace = self._pace_class()(
            costs,
            chunks=setting.chunks,
            layers=setting.layers,
            threads=setting.threads,
            following_seconds=_following_seconds(setting, costs),
            ranges=self._ranges,
            credit=credit,
        )
        staged = STAGED_PER_THREAD * setting.threads if setting.most_staged is None else setting.most_staged
        self._frontier = Frontier(
            [index not in setting.holes for index in range(setting.chunks)],
            strategy=Strategy.BOTH if policy in ("cake", "fixed") else Strategy(policy),
            read_timeout=setting.read_timeout,
            most_staged=setting.chunks if policy == "cake" else staged,
            judge=_CakesOwn() if policy == "cake" else self.pace,
            clock=self._clock,
            changed=_Changed(self._clock, self._wake),
        )
        self._gate = LayerGate(self._frontier, last=setting.threads, ranges=self._ranges)

    def run(self) -> Outcome:
        for number in range(self._setting.threads if self._policy != "compute" else 0):
            self._load_next(f"load-{number}")
        self._walk(self._setting.chunks, past_loads=self._gate.is_open)
        self._last_piece()
        self.pace.end(self._clock.now)
        ends = self._frontier.outcomes()
        loaded = [index for index, end in sorted(ends.items()) if end is LoadOutcome.LOADED]
        forms = tuple(self._forms[index] for index in loaded if index in self._forms)
        computed, spans, reads = self._setting.chunks - len(loaded), tuple(self._spans), tuple(self._reads)
        return Outcome(self._clock.now, computed, len(loaded), self._left, spans, reads, forms)

    def _pace_class(self) -> Callable[..., Pace]:
        if self._setting.forms and self._policy == "both":
            where = self._setting
            return partial(Adapting, forms=where.forms, chunk_bytes=where.chunk_bytes, deadline=where.max_ttft)
        return _Fixed if self._policy == "fixed" else Pace

    def _walk(self, until: int, *, past_loads: bool) -> None:
        seconds = self._setting.step_seconds
        while (index := self._frontier.advance(until=until, past_loads=past_loads)) is not None:
            self._gate.went_to(index)
            self._frontier.take_staged()  # putting chunks into place takes no time here
            begin = self._clock.now
            if self._forward(index, seconds[index]):
                self._frontier.computed(index)
                self._record("compute", index, begin, "computed")
            else:
                self._frontier.give_back(index)
                self._left += 1
                self._record("compute", index, begin, "preempted")
        self._gate.went_to(until)

    def _forward(self, index: int, seconds: float) -> bool:
        """Compute a chunk; False if it was left, at the border of a layer, since the chunk has arrived."""
        begin, layers, taken = self._clock.now, self._setting.layers, self._taken
        if self._gate.beyond:
            self._behind_loads(seconds)
            return True
        for layer in range(1, layers + 1):
            self._compute(begin, seconds * layer / layers, taken)
            self._frontier.take_staged()  # as in each layer
            if self._policy != "cake" and layer < layers and self._is_left(index, begin, layer / layers):
                return False
        self.pace.saw_forward(index, self._clock.now - begin)
        return True

    def _compute(self, begin: float, work: float, taken: float) -> None:
        """Let pass what computing takes.

        Args:
            begin: when it began.
            work: seconds that it takes at speed 1, if nothing is decoded on the same cores meanwhile.
            taken: what decoding had taken when it began.
        """
        self._computes = True
        while (end := self._setting.compute_speed.end(begin, work + self._taken - taken)) > self._clock.now:
            self._clock.go_to(end)
        self._computes = False

    def _is_left(self, index: int, begin: float, share: float) -> bool:
        preempted = self._frontier.preempted(index)
        if preempted or self._frontier.is_trial(index):
            self.pace.saw_forward(index, self._clock.now - begin, share)
        return preempted or (self._frontier.is_trial(index) and not self._frontier.goes_on(index))

    def _last_piece(self) -> None:
        """Runs the prompt's last piece; loads may still be under way."""
        if not self._gate.beyond:
            self._compute(self._clock.now, self._setting.suffix_seconds, self._taken)
        else:
            self._behind_loads(self._setting.suffix_seconds)

    def _behind_loads(self, seconds: float) -> None:
        """Runs the last piece, or a hole behind the loads, through each layer as soon as that layer of them is there."""
        for layer in range(self._setting.layers):
            self._gate.await_layer(layer, lambda _: None, lambda until: self._walk(until, past_loads=False))
            self._compute(self._clock.now, seconds / self._setting.layers, self._taken)

    def _wake(self) -> None:
        """Has loaders that found nothing to load look again, at the same moment."""
        woken, self._idle = self._idle, []
        for actor in woken:
            self._clock.plan(self._clock.now, partial(self._load_next, actor))

    def _load_next(self, actor: str) -> None:
        """A loader claims a chunk; it reads it whole, or one range of layers after the other."""
        index = self._frontier.claim()
        if index is None:
            self._idle.append(actor)
            return
        brought = self.brought[index] = self._setting.brought(self._choose(index))
        ranges = self._gate.ranges_of(index)
        self._read(actor, index, self._clock.now, 1, 1 if brought.decoding else ranges)

    def _choose(self, index: int) -> CodecCost | None:
        """The form of the load that was just claimed."""
        if not self._setting.forms:
            return self._setting.codec
        form = self._forms[index] = self._frontier.form(index)
        return self._setting.forms[form]

    def _read(self, actor: str, index: int, begin: float, number: int, ranges: int) -> None:
        """Book the line for the next range; what the loader does when that read ends is planned."""
        brought = self.brought[index]
        share = brought.nbytes / brought.raw_bytes
        seconds = share * self._setting.chunk_bytes / self._setting.bandwidth / ranges
        start = max(self._clock.now, self._line_free_at)
        self._line_free_at = self._setting.line_speed.end(start, seconds)
        self._reads.append((index, start, self._line_free_at))

        def read_ends() -> None:
            if number < ranges:
                self._gate.landed(index, self._setting.layers * number // ranges)
                self._read(actor, index, begin, number + 1, ranges)
                return
            if brought.decoding and self._computes and self._setting.cores:
                self._taken += brought.decoding / self._setting.cores
            if brought.decoding:
                self._clock.plan(self._clock.now + brought.decoding, load_ends)
            else:
                load_ends()

        def load_ends() -> None:
            if self._frontier.settle(index, LoadOutcome.LOADED, brought):
                self._record(actor, index, begin, LoadOutcome.LOADED.value)
            self._load_next(actor)

        self._clock.plan(self._line_free_at + self._setting.latency, read_ends)

    def _record(self, actor: str, index: int, begin: float, outcome: str) -> None:
        self._spans.append(Span(actor, index, begin, self._clock.now, outcome))


def _following_seconds(setting: Setting, costs: Costs) -> float:
    """Returns the cost of what follows the loads: a hole after a stored chunk, or else the prompt's last piece."""
    first = next((index for index in range(setting.chunks) if index not in setting.holes), setting.chunks)
    hole = next((index for index in setting.holes if index > first), None)
    if hole is None or costs.compute is None:
        return setting.suffix_seconds
    return costs.compute.seconds(hole)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # so that NaN is refused, too
        raise ValueError(f"The {name} must be between {low:g} and {high:g}, got {value:g}.")
