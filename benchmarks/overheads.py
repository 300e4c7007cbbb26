"""The cost of our own bookkeeping: naming and looking up a long prompt's chunks, and the decisions per chunk.

Looking up: namespace, keys and the question to the store, for 128K tokens (256 chunks of 512), on a local store with many
chunks, among them half of the prompt's. The files are empty, since a lookup opens none.

Deciding: one prompt of as many chunks through the frontier and the planner, on one thread, with every load settled as soon as
it is claimed. Nothing is computed or read, so all the time is theirs. For each computed chunk the model asks once per layer
whether it was preempted; that is counted, too.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.figures import Figure, Goal, Result
from benchmarks.timing import Sample
from benchmarks.workbench import Workbench, remove
from cake_hf.blocks import HeldBlocks
from cake_hf.errors import CakeError
from cake_hf.limits import STAGED_PER_THREAD
from cake_hf.report import Report
from cake_hf.restore.prompt import CallBlocks, Prompt, open_prompt
from cake_hf.restore.request import ForwardCall
from cake_hf.restore.session import Session
from cake_hf.scheduling.costs import ComputeCost, Costs, LoadCost
from cake_hf.scheduling.frontier import Frontier, Outcome
from cake_hf.scheduling.layer_gate import LayerGate
from cake_hf.scheduling.pace import Pace
from cake_hf.stores.folder import Folder
from cake_hf.stores.local import LocalStore

SOON_KNOWN = Goal(20.0)
CHEAPLY_DECIDED = Goal(50.0)
TOKENS, CHUNK_SIZE = 128 * 2**10, 512
CHUNKS = TOKENS // CHUNK_SIZE
ROUNDS = 10
"""More rounds than the settings ask for: each takes milliseconds."""
KEY_DIGITS = 40

ALWAYS_WORTH = Costs(ComputeCost(1e-9), LoadCost(latency=0.0, bandwidth=1.0, chunk_bytes=1.0))
"""With loads this slow a step is always worth starting, so that the main thread never waits; waiting is no work."""


@dataclass(frozen=True)
class Naming:
    """Times, in seconds, until one prompt knows which of its keys are stored.

    Attributes:
        whole: of all that a restore does before it knows what it can load.
        namespace, lookup: of these parts alone.
    """

    whole: float
    namespace: float
    lookup: float


def measure(bench: Workbench) -> Result:
    """Times both."""
    layers, named = bench.settings.shape.layers, _name_prompts(bench)
    decided = Sample(tuple(decide_seconds(CHUNKS, layers) / CHUNKS * 1e6 for _ in range(ROUNDS)))
    return Result(
        f"Overheads of {TOKENS:,} tokens in {CHUNKS} chunks",
        {
            "named_milliseconds": _figure("keys + lookup", named, lambda one: one.whole, SOON_KNOWN),
            "namespace_milliseconds": _figure("the namespace of it", named, lambda one: one.namespace),
            "lookup_milliseconds": _figure("the question to the store", named, lambda one: one.lookup),
            "decision_microseconds": Figure.of("deciding, per chunk", decided, "us", CHEAPLY_DECIDED),
        },
        {"stored_files": bench.settings.stored_files, "layers": layers},
    )


def _figure(
    label: str, named: Sequence[Naming], seconds: Callable[[Naming], float], goal: Goal | None = None
) -> Figure:
    return Figure.of(label, Sample(tuple(1e3 * seconds(one) for one in named)), "ms", goal)


def _name_prompts(bench: Workbench) -> list[Naming]:
    """Times new prompts, one after the other, on a store with many chunks."""
    folder = bench.fresh_folder()
    try:
        session = bench.session(LocalStore(folder, budget=None), chunk_size=CHUNK_SIZE)
        with closing(session):
            calls = [_random_call(bench, seed) for seed in range(ROUNDS)]
            stored = [key for call in calls for key in _look_up(session, call).keys[: CHUNKS // 2]]
            fill(folder, stored, bench.settings.stored_files)
            return [_name(session, call) for call in calls]
    finally:
        remove(folder)


def _random_call(bench: Workbench, seed: int) -> ForwardCall:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, bench.settings.shape.vocabulary, (1, TOKENS), generator=generator)
    return ForwardCall.parse(bench.model, (), {"input_ids": ids.to(bench.settings.device)}, None, 0)


def _look_up(session: Session, call: ForwardCall) -> Prompt:
    wanted = CallBlocks.of(call, (), session.chunk_size, 1)
    return open_prompt(session, call, wanted, HeldBlocks(), Report(), time.monotonic(), session.bound_model.namespace())


def _name(session: Session, call: ForwardCall) -> Naming:
    """Does what a restore does before it knows what is stored, and two parts of it once more.

    Raises:
        CakeError: the store did not find what it has.
    """
    times = [time.perf_counter()]
    prompt = _look_up(session, call)
    times.append(time.perf_counter())
    session.bound_model.namespace()
    times.append(time.perf_counter())
    session.bound_store.store.contains(prompt.keys)
    times.append(time.perf_counter())
    if sum(prompt.stored) != CHUNKS // 2:
        raise CakeError(f"{sum(prompt.stored)} of the prompt's chunks were found, {CHUNKS // 2} are stored.")
    return Naming(*(end - begin for begin, end in pairwise(times)))


def fill(folder: Path, keys: Iterable[str], count: int) -> None:
    """Makes an empty file for each of the keys, and for others, until there are `count`, as a local store names them."""
    numbers = random.Random(0)
    named = list(keys)
    others = (f"{numbers.getrandbits(4 * KEY_DIGITS):0{KEY_DIGITS}x}" for _ in range(count - len(named)))
    for shard in range(256):
        (folder / f"{shard:02x}").mkdir(exist_ok=True)
    for key in (*named, *others):
        os.close(os.open(Folder(folder).path(key), os.O_WRONLY | os.O_CREAT, 0o644))


def decide_seconds(chunks: int, layers: int) -> float:
    """Returns the seconds of all decisions of one restore, the two sides taking turns until they meet."""
    threads = 2
    begin = time.perf_counter()
    frontier = Frontier(
        [True] * chunks,
        most_staged=STAGED_PER_THREAD * threads,
        judge=Pace(ALWAYS_WORTH, chunks=chunks, threads=threads, layers=layers),
    )
    gate = LayerGate(frontier, last=threads, ranges=layers)
    while (chunk := frontier.advance(past_loads=True)) is not None:
        if frontier.has_claims() and (claimed := frontier.claim()) is not None:
            frontier.is_staged(claimed)
            gate.ranges_of(claimed)
            frontier.settle(claimed, Outcome.LOADED)
        preempted = any(frontier.preempted(chunk) for _ in range(layers))
        if not preempted:
            frontier.computed(chunk)
        frontier.take_staged()
        frontier.take_abandoned()
    return time.perf_counter() - begin
