"""Laws of the two-ended ledger, under any interleaving that hypothesis can think of and under real threads.

Conservation: every chunk is in exactly one state, so the counts always sum to all chunks, and a chunk is claimed by one
side at a time. `FrontierMachine` plays loaders and main thread in one thread, on a clock that moves only when told, and
predicts every answer from a plain model of the rules.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cake_hf.scheduling.frontier import Frontier, Outcome, State, Strategy
from cake_hf.scheduling.layer_gate import LayerGate
from cake_hf.transfer.deadline import ask
from paces import Told, in_place, staged

TIMEOUT = 10
PATIENCE = 60.0
LONGER = 10 * PATIENCE
"""A deadline that no waiting test lives to see: what ends such a wait is a call, not the time."""
SETTLED = [Outcome.LOADED, Outcome.MISSED, Outcome.CORRUPT, Outcome.ERROR]

masks = st.lists(st.booleans(), max_size=12)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def check_conservation(frontier: Frontier, chunks: int) -> None:
    counts = frontier.counts()
    assert sum(counts.values()) == chunks
    assert counts[State.COMPUTING] <= 1


class FrontierMachine(RuleBasedStateMachine):
    """Any order of claims, settles, computations, ticks and stops, against a model of what each must answer."""

    @initialize(present=masks, strategy=st.sampled_from(Strategy))
    def begin(self, present: list[bool], strategy: Strategy) -> None:
        self.clock = Clock()
        self.strategy = strategy
        self.frontier = Frontier(present, strategy=strategy, read_timeout=TIMEOUT, clock=self.clock)
        loadable = strategy is not Strategy.COMPUTE
        self.states = [State.WAITING if has and loadable else State.ABSENT for has in present]
        self.outcomes: dict[int, Outcome] = {}
        self.claimed_at: dict[int, float] = {}
        self.progress = 0.0
        self.open = True
        self.abandoned = False
        self.given_up: set[int] = set()

    def indices(self, *wanted: State) -> list[int]:
        return [index for index, state in enumerate(self.states) if state in wanted]

    def front(self) -> int | None:
        return next((i for i, state in enumerate(self.states) if state not in (State.LOADED, State.COMPUTED)), None)

    def waits_since(self) -> float | None:
        """Since when the main thread has a reason to wait at the front; None where it has none."""
        front = self.front()
        if front is None:
            return None
        left_to_loaders = self.states[front] is State.WAITING and self.strategy is Strategy.LOAD and self.open
        if self.states[front] is not State.LOADING and not left_to_loaders:
            return None
        return self.claimed_at.get(front, self.progress)

    def would_block(self) -> bool:
        since = self.waits_since()
        return since is not None and self.clock.now - since < TIMEOUT

    def expect_give_up(self) -> None:
        self.open = False
        for index in self.indices(State.LOADING):
            self.states[index], self.outcomes[index] = State.FAILED, Outcome.LATE
            self.given_up.add(index)
            self.abandoned = True

    @rule()
    def claim(self) -> None:
        waiting = self.indices(State.WAITING) if self.open else []
        index = self.frontier.claim()
        assert index == (waiting[-1] if waiting else None)
        if index is not None:
            self.states[index] = State.LOADING
            self.claimed_at[index] = self.progress = self.clock.now

    @precondition(lambda self: self.indices(State.LOADING))
    @rule(data=st.data(), outcome=st.sampled_from(SETTLED))
    def settle(self, data: st.DataObject, outcome: Outcome) -> None:
        index = data.draw(st.sampled_from(self.indices(State.LOADING)))
        assert self.frontier.settle(index, outcome) is True
        self.states[index] = State.LOADED if outcome is Outcome.LOADED else State.FAILED
        self.outcomes[index] = outcome
        self.progress = self.clock.now

    @precondition(lambda self: self.given_up)
    @rule(data=st.data(), outcome=st.sampled_from(SETTLED))
    def settle_too_late(self, data: st.DataObject, outcome: Outcome) -> None:
        index = data.draw(st.sampled_from(sorted(self.given_up)))
        assert self.frontier.settle(index, outcome) is False

    @precondition(lambda self: not self.would_block())
    @rule()
    def advance(self) -> None:
        if self.waits_since() is not None:
            self.expect_give_up()
        front = self.front()
        assert self.frontier.advance() == front
        if front is not None:
            self.states[front] = State.COMPUTING

    @precondition(lambda self: self.would_block())
    @rule()
    def advance_after_the_deadline(self) -> None:
        self.clock.now += TIMEOUT
        self.advance()

    @precondition(lambda self: self.indices(State.COMPUTING))
    @rule()
    def computed(self) -> None:
        (index,) = self.indices(State.COMPUTING)
        self.frontier.computed(index)
        self.states[index] = State.COMPUTED

    @rule(data=st.data())
    def computed_without_a_claim(self, data: st.DataObject) -> None:
        others = [index for index, state in enumerate(self.states) if state is not State.COMPUTING]
        if others:
            with pytest.raises(RuntimeError, match="not computing"):
                self.frontier.computed(data.draw(st.sampled_from(others)))

    @rule(seconds=st.integers(1, TIMEOUT))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def take_abandoned(self) -> None:
        assert self.frontier.take_abandoned() is self.abandoned
        self.abandoned = False

    @precondition(lambda self: self.clock.now > 3 * TIMEOUT)
    @rule()
    def stop(self) -> None:
        self.frontier.stop()
        self.expect_give_up()

    @invariant()
    def ledger_is_conserved(self) -> None:
        check_conservation(self.frontier, len(self.states))
        assert self.frontier.counts() == Counter(self.states)
        assert self.frontier.outcomes() == self.outcomes

    def teardown(self) -> None:
        """Whatever went before, the main thread alone can always bring the restore to its end."""
        if not hasattr(self, "frontier"):
            return
        self.frontier.stop()
        for index in self.indices(State.COMPUTING):
            self.frontier.computed(index)
        while (index := self.frontier.advance()) is not None:
            self.frontier.computed(index)
        assert set(self.frontier.counts()) <= {State.COMPUTED, State.LOADED}


FrontierMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestFrontierMachine = FrontierMachine.TestCase


def test_a_loaded_chunk_at_the_front_was_not_computed_by_anybody() -> None:
    frontier = Frontier([True, True])
    assert frontier.claim() == 1
    assert frontier.claim() == 0
    frontier.settle(0, Outcome.LOADED)
    with pytest.raises(RuntimeError, match="loaded, not computing"):
        frontier.computed(0)


@given(masks)
def test_compute_alone_loads_nothing(present: list[bool]) -> None:
    frontier = Frontier(present, strategy=Strategy.COMPUTE)
    made = []
    while (index := frontier.advance()) is not None:
        assert frontier.claim() is None
        made.append(index)
        frontier.computed(index)
    assert made == list(range(len(present)))
    assert frontier.outcomes() == {}


@given(masks)
def test_load_alone_computes_only_the_holes(present: list[bool]) -> None:
    frontier = Frontier(present, strategy=Strategy.LOAD)
    loaded = []
    while (index := frontier.claim()) is not None:
        loaded.append(index)
        frontier.settle(index, Outcome.LOADED)
    made = []
    while (index := frontier.advance()) is not None:
        made.append(index)
        frontier.computed(index)
    assert loaded == [index for index, has in reversed(list(enumerate(present))) if has]
    assert made == [index for index, has in enumerate(present) if not has]


@given(masks, st.data())
def test_both_sides_meet_where_the_loads_stop(present: list[bool], data: st.DataObject) -> None:
    """After k loads from the back, the front computes everything but those k."""
    stored = [index for index, has in enumerate(present) if has]
    count = data.draw(st.integers(0, len(stored)))
    frontier = Frontier(present)
    loaded = [frontier.claim() for _ in range(count)]
    assert loaded == stored[::-1][:count]
    for index in loaded:
        assert index is not None
        frontier.settle(index, Outcome.LOADED)
    made = []
    while (index := frontier.advance()) is not None:
        made.append(index)
        frontier.computed(index)
    assert made == [index for index in range(len(present)) if index not in loaded]


@given(masks, st.sampled_from(SETTLED[1:]))
def test_a_load_that_went_wrong_is_computed(present: list[bool], outcome: Outcome) -> None:
    frontier = Frontier(present)
    while (index := frontier.claim()) is not None:
        frontier.settle(index, outcome)
    made = []
    while (index := frontier.advance()) is not None:
        made.append(index)
        frontier.computed(index)
    assert made == list(range(len(present)))
    assert frontier.outcomes() == {index: outcome for index, has in enumerate(present) if has}


def test_no_chunks_is_a_restore_that_has_ended() -> None:
    frontier = Frontier([])
    assert frontier.claim() is None
    assert frontier.advance() is None
    assert not frontier.counts()
    assert frontier.take_abandoned() is False


def test_advance_gives_the_same_chunk_until_it_is_computed() -> None:
    frontier = Frontier([False, False])
    assert [frontier.advance(), frontier.advance()] == [0, 0]
    frontier.computed(0)
    assert frontier.advance() == 1


def test_asking_changes_nothing() -> None:
    frontier = Frontier([True, True, False])
    frontier.claim()
    before = frontier.counts(), frontier.outcomes()
    frontier.counts()[State.LOADED] = 99
    frontier.outcomes()[2] = Outcome.LOADED
    assert (frontier.counts(), frontier.outcomes()) == before


def test_all_loads_in_flight_are_given_up_together() -> None:
    """The store that hangs with the front chunk is the one that the other loads wait for too."""
    clock = Clock()
    frontier = Frontier([True] * 4, read_timeout=TIMEOUT, clock=clock)
    while frontier.claim() is not None:
        pass
    frontier.settle(2, Outcome.LOADED)
    clock.now = TIMEOUT
    assert frontier.advance() == 0
    assert frontier.outcomes() == {0: Outcome.LATE, 1: Outcome.LATE, 2: Outcome.LOADED, 3: Outcome.LATE}
    assert [frontier.take_abandoned(), frontier.take_abandoned()] == [True, False]
    assert not any(frontier.settle(index, Outcome.LOADED) for index in (0, 1, 3))
    assert frontier.claim() is None


def test_the_deadline_of_a_read_counts_from_its_own_claim() -> None:
    """Other loads going well is no reason to wait longer for the one that hangs."""
    clock = Clock()
    frontier = Frontier([True, True], read_timeout=TIMEOUT, clock=clock)
    assert [frontier.claim(), frontier.claim()] == [1, 0]
    clock.now = TIMEOUT - 1
    frontier.settle(1, Outcome.LOADED)
    clock.now = TIMEOUT
    assert ask(frontier.advance, PATIENCE, "advance").get() == 0
    assert frontier.outcomes() == {0: Outcome.LATE, 1: Outcome.LOADED}


class SignallingClock(Clock):
    """Says when the frontier looks at it. `advance` does so with the lock held, just before it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_at = threading.Event()

    def __call__(self) -> float:
        self.looked_at.set()
        return self.now


class Advancing:
    """A main thread that is blocked in `advance`, for certain."""

    def __init__(self, frontier: Frontier, clock: SignallingClock) -> None:
        self.result: list[int | None] = []
        clock.looked_at.clear()
        self.thread = threading.Thread(target=lambda: self.result.append(frontier.advance()), daemon=True)
        self.thread.start()
        assert clock.looked_at.wait(PATIENCE)

    def returned(self) -> int | None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "advance was not woken"
        return self.result[0]


def blocked_frontier(strategy: Strategy = Strategy.BOTH) -> tuple[Frontier, Advancing]:
    """Two stored chunks, the loader holds both, and the main thread waits for the first; the clock stands still."""
    clock = SignallingClock()
    frontier = Frontier([True, True], strategy=strategy, read_timeout=LONGER, clock=clock)
    assert [frontier.claim(), frontier.claim()] == [1, 0]
    return frontier, Advancing(frontier, clock)


def test_a_waiting_main_thread_walks_over_what_was_loaded() -> None:
    frontier, advancing = blocked_frontier()
    frontier.settle(1, Outcome.LOADED)
    frontier.settle(0, Outcome.LOADED)
    assert advancing.returned() is None


def test_a_waiting_main_thread_computes_what_could_not_be_loaded() -> None:
    frontier, advancing = blocked_frontier(Strategy.LOAD)
    frontier.settle(0, Outcome.CORRUPT)
    assert advancing.returned() == 0


def test_stop_wakes_a_waiting_main_thread() -> None:
    frontier, advancing = blocked_frontier()
    frontier.stop()
    assert advancing.returned() == 0
    assert frontier.take_abandoned() is True
    assert frontier.claim() is None


def test_load_alone_waits_for_a_loader_to_come() -> None:
    clock = SignallingClock()
    frontier = Frontier([True], strategy=Strategy.LOAD, read_timeout=LONGER, clock=clock)
    advancing = Advancing(frontier, clock)
    assert frontier.claim() == 0
    frontier.settle(0, Outcome.LOADED)
    assert advancing.returned() is None


def test_load_alone_waits_as_long_as_the_loaders_get_on() -> None:
    """The deadline of a chunk that is not claimed yet counts from the last load that ended."""
    clock = SignallingClock()
    frontier = Frontier([True, True], strategy=Strategy.LOAD, read_timeout=LONGER, clock=clock)
    assert frontier.claim() == 1
    clock.now = LONGER - 1
    frontier.settle(1, Outcome.LOADED)
    clock.now = LONGER + 1
    advancing = Advancing(frontier, clock)
    assert frontier.claim() == 0
    frontier.settle(0, Outcome.LOADED)
    assert advancing.returned() is None


@pytest.mark.parametrize("strategy", [Strategy.BOTH, Strategy.LOAD])
def test_a_load_that_never_ends_is_not_waited_for_for_ever(strategy: Strategy) -> None:
    """On the real clock: were the deadline not kept, this would hang into the test's own time limit."""
    frontier = Frontier([True, True], strategy=strategy, read_timeout=0.01)
    assert [frontier.claim(), frontier.claim()] == [1, 0]
    assert frontier.advance() == 0
    assert frontier.outcomes() == {0: Outcome.LATE, 1: Outcome.LATE}


def test_load_alone_without_any_loader_ends_too() -> None:
    frontier = Frontier([True], strategy=Strategy.LOAD, read_timeout=0.01)
    assert frontier.advance() == 0
    assert frontier.take_abandoned() is False


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("seed", range(10))
def test_real_threads_share_the_chunks_without_overlap(strategy: Strategy, seed: int) -> None:
    """Four loaders and a main thread, let go together: each chunk is claimed once by each side at most, none is lost."""
    draw = random.Random(seed)
    present = [draw.random() < 0.8 for _ in range(300)]
    endings = [draw.choice([Outcome.LOADED] * 4 + SETTLED) for _ in present]
    frontier = Frontier(present, strategy=strategy, read_timeout=PATIENCE)
    start = threading.Barrier(5)
    loads: list[tuple[int, bool]] = []
    made: list[int] = []

    def load() -> None:
        start.wait(PATIENCE)
        while (index := frontier.claim()) is not None:
            check_conservation(frontier, len(present))
            loads.append((index, frontier.settle(index, endings[index])))

    threads = [threading.Thread(target=load, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.wait(PATIENCE)
    while (index := frontier.advance()) is not None:
        made.append(index)
        frontier.computed(index)
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)

    claimed = [index for index, _ in loads]
    loaded = {index for index, counted in loads if counted and endings[index] is Outcome.LOADED}
    assert len(set(claimed)) == len(claimed)
    assert made == sorted(set(range(len(present))) - loaded)
    assert all(present[index] for index in claimed)
    assert all(counted for _, counted in loads)
    assert frontier.outcomes() == {index: endings[index] for index in claimed}
    assert frontier.counts() == Counter({State.COMPUTED: len(made), State.LOADED: len(loaded)})


@pytest.mark.parametrize("seed", range(5))
def test_real_threads_that_are_stopped_midway_lose_nothing(seed: int) -> None:
    """After `stop`, a load that comes back is told so, and the main thread makes all that was not loaded by then.

    All claims before it, three times sixty at most, never come down to chunk 0: the main thread is not to wait for that one.
    """
    draw = random.Random(seed)
    frontier = Frontier([True] * 200, read_timeout=PATIENCE)
    start = threading.Barrier(4)
    stopped = threading.Event()
    counted: list[int] = []
    refused: list[int] = []

    def load(loads_before_stop: int) -> None:
        start.wait(PATIENCE)
        for number in range(200):
            if (index := frontier.claim()) is None:
                return
            if number == loads_before_stop:
                assert stopped.wait(PATIENCE)
            (counted if frontier.settle(index, Outcome.LOADED) else refused).append(index)

    threads = [threading.Thread(target=load, args=(draw.randrange(60),), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    start.wait(PATIENCE)
    first = frontier.advance()
    frontier.stop()
    stopped.set()
    made = []
    while first is not None:
        made.append(first)
        frontier.computed(first)
        first = frontier.advance()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(made + counted) == list(range(200))
    assert set(refused) == {index for index, outcome in frontier.outcomes().items() if outcome is Outcome.LATE}


LAYERS = 3


@settings(max_examples=300)
@given(
    present=st.lists(st.booleans(), min_size=1, max_size=8),
    strategy=st.sampled_from([Strategy.BOTH, Strategy.LOAD]),
    contest=st.booleans(),
    moves=st.lists(st.tuples(st.sampled_from(["claim", "landed", "settle", "walk"]), st.integers(0, 7)), max_size=60),
    outcomes=st.lists(st.sampled_from([Outcome.LOADED, Outcome.LOADED, Outcome.CORRUPT, Outcome.MISSED]), min_size=1),
    patience=st.integers(0, 60),
)
def test_nothing_is_used_before_it_is_there(
    present: list[bool],
    strategy: Strategy,
    contest: bool,
    moves: list[tuple[str, int]],
    outcomes: list[Outcome],
    patience: int,
) -> None:
    """The main thread goes beyond the loads wherever it may, and asks for layer after layer; loaders act in between.

    One thread plays all parts, in an order that hypothesis draws. Whenever `await_layer` says yes, that layer of all chunks
    before is there; where it is not, all is made up for; and in the end each chunk was made once. All loads are in place, or
    all are staged and are superseded once the main thread has asked often enough.
    """
    asked = itertools.count()
    judge = Told(staged if contest else in_place, lambda _: next(asked) > patience)
    frontier = Frontier(present, strategy=strategy, judge=judge, clock=Clock())
    gate = LayerGate(frontier, last=2, ranges=LAYERS)
    made: set[int] = set()
    there = dict.fromkeys(range(len(present)), 0)  # how many layers
    loading: list[int] = []
    script = iter(moves + [("claim", 0), ("settle", 0), ("landed", 0)] * 40)

    def load(move: str, number: int) -> None:
        if move == "claim" and (index := frontier.claim()) is not None:
            loading.append(index)
        elif move == "landed" and loading:
            index = loading[number % len(loading)]
            if there[index] < LAYERS:
                gate.landed(index, there[index] + 1)
                there[index] += 1
        elif move == "settle" and loading:
            index = loading.pop(number % len(loading))
            # A layer is told of when it has been checked: a load whose layers are all there is a good one.
            outcome = Outcome.LOADED if there[index] == LAYERS else outcomes[number % len(outcomes)]
            if frontier.settle(index, outcome):
                there[index] = LAYERS if outcome is Outcome.LOADED else 0

    def let_loaders_act() -> None:
        for move, number in script:
            if move == "walk":
                return
            load(move, number)

    class FinalizerLock:
        """Stands in for the condition: where the main thread would wait, the loaders act."""

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        def wait(self, timeout: float | None = None) -> None:
            load(*next(script))

        def notify_all(self) -> None: ...

    frontier._changed = FinalizerLock()

    def make(until: int) -> None:
        walk(until, past_loads=False)
        assert all(there[index] == LAYERS for index in range(until))

    def use_all_layers(before: int) -> None:
        for layer in range(LAYERS):
            let_loaders_act()
            if gate.beyond:
                gate.await_layer(layer, lambda _: None, make)
            assert all(there[index] > layer for index in range(before))

    def walk(until: int, *, past_loads: bool) -> None:
        while (index := frontier.advance(until=until, past_loads=past_loads)) is not None:
            assert index < until
            gate.went_to(index)
            if past_loads:
                use_all_layers(index)
            assert all(there[before] == LAYERS for before in range(index))
            frontier.computed(index)
            there[index] = LAYERS
            made.add(index)
        gate.went_to(until)

    let_loaders_act()
    walk(len(present), past_loads=True)
    use_all_layers(len(present))
    for move in [("settle", 0)] * len(present):
        load(*move)
    assert set(there.values()) == {LAYERS}
    assert set(frontier.counts()) <= {State.COMPUTED, State.LOADED}
