"""The soak of `soak.py` for ten seconds or so, and that it would notice what it looks for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cake_hf import CorruptChunk
from cake_hf.stores import LocalStore
from cake_hf.testing.contract import key_of
from soak import LEAST_KILLS, LEAST_LOOKS, Outcome, growth, look_back, soak


def test_a_short_soak_keeps_to_the_budget(tmp_path: Path) -> None:
    outcome = soak(10.0, processes=4, caches=0, seed=0, base=tmp_path)
    assert outcome.wrong == []
    assert outcome.left == []
    assert outcome.most <= outcome.budget
    assert outcome.most > outcome.budget - 2 * outcome.largest, "the budget was never reached, so nothing was shown"
    assert outcome.kills >= LEAST_KILLS
    assert outcome.chunks > 0
    assert min(outcome.done[what] for what in ("written", "deleted", "read", "missed")) > 0
    assert all(change["looks"] >= LEAST_LOOKS for change in outcome.growth)


def test_damaged_chunks_and_broken_bounds_are_reported(tmp_path: Path) -> None:
    LocalStore(tmp_path, budget=1000).write(key_of(1), [b"not a chunk"])
    with pytest.raises(CorruptChunk):
        look_back(Outcome(budget=10**6, largest=10), tmp_path, [])
    LocalStore(tmp_path).delete(key_of(1))
    outcome = Outcome(budget=10, largest=10, most=11, done=Counter(failed=1))
    look_back(outcome, tmp_path, [])
    assert len(outcome.wrong) == 2


def test_growth_of_threads_files_and_memory_is_measured() -> None:
    level = [{"threads": 1, "files": 5, "resident": 1000}] * 30
    assert growth(level) == {"threads": 0, "files": 0, "resident": 0.0, "looks": 30}
    rising = [{"threads": 1 + n // 10, "files": 5 + n, "resident": 1000 + 50 * n} for n in range(30)]
    assert growth(rising) == {"threads": 1, "files": 10, "resident": pytest.approx(0.256, abs=0.01), "looks": 30}
