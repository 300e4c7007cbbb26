"""A model whose heads are spread over two processes: what one rank has lost, both compute, and neither waits for ever."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_hf.model.ranks import Ranks
from cake_hf.restore.pacing import AgreedSteps, Steps, steps_for
from cake_hf.scheduling.frontier import Frontier, Outcome
from models import CHUNKS
from old_versions import OLD

RUNS = Path(__file__).parent / "rank_runs.py"
PATIENCE = 280

Seen = list[Any]
"""What the ranks have seen of a case, by rank."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """All cases, once, in two processes that meet on the loopback."""
    if OLD:
        pytest.skip("older transformers has another way to spread a model over ranks, which is not served")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(RUNS)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        with ThreadPoolExecutor(2) as readers:
            texts = list(readers.map(lambda rank: rank.communicate(timeout=PATIENCE), ranks))
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], texts
    found = [json.loads(out.splitlines()[-1]) for out, _ in texts]
    return {name: [one.get(name, "did not come so far") for one in found] for name in found[0]}


def test_cold_and_warm(runs: dict[str, Seen]) -> None:
    for seen in runs["case_cold_and_warm"]:
        assert (seen["cold"]["difference"], seen["cold"]["computed"]) == ("", CHUNKS)
        assert (seen["warm"]["difference"], seen["warm"]["loaded"]) == ("", CHUNKS)
        assert seen["both"] == ""
        assert seen["keys"] == 2 * CHUNKS, "each rank has chunks of its own"
    assert len({str(seen["made"]) for seen in runs["case_cold_and_warm"]}) == 1


@pytest.mark.parametrize(
    ("case", "made", "failed"),
    [
        ("case_a_corrupt_chunk_on_one_rank", [3, 5], [0, 2]),
        ("case_other_faults_on_each_rank", [1, 2, 6], [0, 2]),
        ("case_nothing_stored_on_one_rank", list(range(CHUNKS)), [0, 0]),
        ("case_a_store_that_cannot_be_asked_on_one_rank", list(range(CHUNKS)), [0, 0]),
        ("case_sharded_by_hand", [3], [0, 1]),
    ],
)
def test_what_one_rank_has_lost_all_compute(
    case: str, made: list[int], failed: list[int], runs: dict[str, Seen]
) -> None:
    for seen, failures in zip(runs[case], failed, strict=True):
        assert (seen["difference"], seen["made"]) == ("", made)
        assert (seen["computed"], seen["loaded"], seen["failed"]) == (len(made), CHUNKS - len(made), failures)


@pytest.mark.parametrize(
    "case", ["case_reads_hang_on_one_rank", "case_the_two_sides_meet_elsewhere_on_each_rank", "case_windows"]
)
def test_all_ranks_take_the_same_steps(case: str, runs: dict[str, Seen]) -> None:
    one, other = (seen if isinstance(seen, list) else [seen] for seen in runs[case])
    assert [run["made"] for run in one] == [run["made"] for run in other]
    assert {run["difference"] for run in one + other} == {""}


def test_windows_are_restored_where_all_ranks_have_them(runs: dict[str, Seen]) -> None:
    for seen in runs["case_windows"]:
        assert seen[0]["made"] == [-1]
        assert len(seen[1]["made"]) > 1


def test_a_batch(runs: dict[str, Seen]) -> None:
    assert runs["case_a_batch"] == [[True, CHUNKS - 1]] * 2


def test_the_namespace_says_which_part(runs: dict[str, Seen]) -> None:
    (facts, namespace), (other_facts, other_namespace) = runs["case_the_namespace_says_which_part"]
    assert (facts["rank"], other_facts["rank"], facts["size"]) == (0, 1, 2)
    assert namespace != other_namespace


def test_ranks_that_cannot_agree_compute(runs: dict[str, Seen]) -> None:
    assert all("not called alike" in reason for reason in runs["case_not_called_alike"])
    for seen in runs["case_sharded_in_another_way"]:
        assert (seen["difference"], seen["loaded"], seen["computed"]) == ("", 0, 0)
        assert "gathered from other processes" in seen["reason"]


# The agreement by itself, between threads.


class Together(Ranks):
    """Ranks that are threads."""

    def __init__(self, rank: int, board: list[list[int]], meet: threading.Barrier) -> None:
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "board", board)
        object.__setattr__(self, "meet", meet)

    def all_reduce_min(self, numbers: Sequence[int]) -> list[int]:
        board: list[list[int]] = self.__dict__["board"]
        meet: threading.Barrier = self.__dict__["meet"]
        board[self.rank] = list(numbers)
        meet.wait(30)
        found = [min(column) for column in zip(*board, strict=True)]
        meet.wait(30)
        return found


def steps_of(outcomes: Sequence[Outcome | None], ranks: Ranks | None) -> tuple[list[int], Steps]:
    """The chunks that a rank makes whose loads end so, before it makes anything; None for a chunk that is not stored."""
    frontier = Frontier([outcome is not None for outcome in outcomes])
    while (claimed := frontier.claim()) is not None:
        outcome = outcomes[claimed]
        assert outcome is not None
        frontier.settle(claimed, outcome)
    steps, made = steps_for(frontier, ranks), []
    while (index := steps.advance(until=len(outcomes), past_loads=False)) is not None:
        made.append(index)
        steps.computed(index)
    return made, steps


def lost(outcomes: Sequence[Outcome | None]) -> list[int]:
    return [index for index, outcome in enumerate(outcomes) if outcome is not Outcome.LOADED]


ends = st.lists(st.sampled_from([None, Outcome.LOADED, Outcome.LOADED, Outcome.CORRUPT]), min_size=6, max_size=6)


@settings(max_examples=40)
@given(all_ends=st.lists(ends, min_size=1, max_size=3))
def test_all_ranks_compute_a_chunk_that_any_rank_lost(all_ends: list[list[Outcome | None]]) -> None:
    size = len(all_ends)
    board, meet = [[] for _ in range(size)], threading.Barrier(size)
    with ThreadPoolExecutor(size) as threads:
        done = [threads.submit(steps_of, one, Together(rank, board, meet)) for rank, one in enumerate(all_ends)]
        found = [future.result(60) for future in done]
    wanted = sorted({index for outcomes in all_ends for index in lost(outcomes)})
    for (made, steps), outcomes in zip(found, all_ends, strict=True):
        assert made == wanted
        assert steps.overruled == set(wanted) - set(lost(outcomes))


def test_ranks_without_an_agreement_run_other_forwards() -> None:
    """Negative control: without the agreement the ranks' forwards are not the same, and would wait for each other."""
    good, bad = [Outcome.LOADED] * 4, [Outcome.LOADED, Outcome.CORRUPT, Outcome.LOADED, None]
    assert [steps_of(outcomes, None)[0] for outcomes in (good, bad)] == [[], [1, 3]]


def test_ranks_stop_at_the_last_chunk_possible_for_all() -> None:
    """Each can stand at some chunks only; 0 is always possible."""
    places = [{0, 1, 3, 5}, {0, 1, 2, 5}, {0, 1, 4}]
    board, meet = [[] for _ in places], threading.Barrier(len(places))

    def stand(rank: int) -> int:
        steps = AgreedSteps(Frontier([True]), Together(rank, board, meet))
        return steps.stand(lambda index: max(place for place in places[rank] if place <= index), 5)

    with ThreadPoolExecutor(len(places)) as threads:
        assert list(threads.map(stand, range(len(places)))) == [1, 1, 1]
