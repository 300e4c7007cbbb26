"""A store that hangs in whatever it is asked: one prompt waits for it about once, not once for each question."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cake_hf import CakeCache, Limits
from cake_hf.transfer.deadline import WaitBudget, wait_budget
from faulty import Faulty, Hang, hanging
from models import CHUNKS, difference, expected, prompt, run, shared_model
from store_runs import opened
from stored import filled_store
from waiting import join_loaders

IMPATIENT = Limits(loader_threads=2, read_timeout=0.2, lookup_timeout=0.2, exit_flush_seconds=0.2)
"""All limits of what is asked here are the whole budget of a prompt, so that the first one ends it."""

QUESTIONS = ("contains", "notes_folder", "read_gradually", "notes", "mismatch_reason")


class Dying(Faulty):
    """Answers until it is asked for one thing, and hangs from then on, in everything that a prompt may ask for.

    Attributes:
        hung: what it hangs in, in this order.
    """

    def __init__(self, last: str, hang: Hang) -> None:
        super().__init__(filled_store(shared_model("llama")), last, hang)
        self.hung: list[str] = []

    def _goes_wrong(self, method: str) -> bool:
        if method not in QUESTIONS or not (self.hung or method == self.method):
            return False
        self.hung.append(method)
        return True


def generates(cache: CakeCache) -> None:
    assert difference(run(shared_model("llama"), prompt(), cache), expected()) == ""


def prefills(cache: CakeCache) -> None:
    """A document whose end is declared: it is restored in two steps, and each asks the store."""
    report = cache.prefill(prompt())
    assert (report.chunks_computed, report.tails_computed) == (CHUNKS, 1)


@pytest.mark.fault(
    "Time and bounds",
    "A store hangs from one moment on, in whatever it is asked.",
    "A prompt waits for it once, for as long as one read or one lookup may take; then it is computed, and asks nothing more.",
)
@pytest.mark.parametrize("asks", [generates, prefills])
@pytest.mark.parametrize("last", ["contains", "notes_folder", "read_gradually"])
def test_a_prompt_waits_for_a_store_once(last: str, asks: Callable[[CakeCache], None]) -> None:
    with hanging() as hang:
        store = Dying(last, hang)
        with opened(store, strategy="load", save=False, limits=IMPATIENT) as cache:
            asks(cache)
            assert set(store.hung) == {last}
            assert len(store.hung) <= IMPATIENT.loader_threads
            assert cache.report.chunks_loaded == 0
    join_loaders()


def test_a_wait_that_ends_with_an_answer_costs_nothing() -> None:
    budget = WaitBudget(5.0)
    with budget.in_this_thread():
        assert wait_budget() is budget
        assert wait_budget().grant(3.0) == 3.0
        assert wait_budget().grant(30.0) == 5.0
        wait_budget().spend(4.0)
        assert wait_budget().grant(3.0) == 1.0
        wait_budget().spend(4.0)
        assert wait_budget().grant(3.0) == 0.0
    assert wait_budget().grant(3.0) == 3.0, "what belongs to no prompt has no budget"


def test_a_prompt_within_another_one_shares_its_budget() -> None:
    with WaitBudget(5.0).in_this_thread():
        wait_budget().spend(5.0)
        with WaitBudget(5.0).in_this_thread():
            assert wait_budget().grant(1.0) == 0.0
