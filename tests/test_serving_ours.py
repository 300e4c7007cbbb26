"""An error of ours in any place costs one restore; the engine goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cake_hf import CakeError, MemoryStore
from cake_hf.testing import expected_faults
from engine_runs import (
    COMPANY,
    DOCUMENT,
    needs_engine,
    plain_company,
    stepping,
    whole,
)
from models import CHUNK, shared_model
from stored import filled_store

pytestmark = needs_engine

IDS = torch.tensor([DOCUMENT])


def stored_document() -> MemoryStore:
    return filled_store(shared_model("llama"), IDS)


# Faults of ours.

SEAMS = [
    ("seams.Engine", "adopt"),
    ("seams.Engine", "reserve"),
    ("seams.Engine", "admit"),
    ("seams.Engine", "publish"),
    ("seams.Engine", "parts"),
    ("seams.Engine", "queue"),
    ("ledger.Ledger", "advance"),
    ("ledger.Ledger", "computed"),
    ("ledger.Ledger", "claim"),
    ("fronts.Fronts", "choose"),
    ("fronts.Fronts", "front"),
    ("audit.Saver", "chunk"),
    ("matching.Matching", "_look_up"),
    ("requests.Requests", "first_token_came"),
    ("requests.Requests", "_count"),
    ("loads.Loaders", "serve"),
    ("manager.BatchingManager", "_hooks_for"),
]


@pytest.mark.fault(
    "Processes",
    "Something in cake_hf fails in the middle of an engine's step.",
    "The restore is abandoned, and its request goes on plainly. The engine, and all other requests, do not notice.",
)
@pytest.mark.parametrize(("owner", "name"), SEAMS, ids=[name for _, name in SEAMS])
@pytest.mark.parametrize("after", [0, 2])
def test_an_error_of_ours_costs_one_restore(owner: str, name: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    file, kind = owner.split(".")
    owned = getattr(import_module(f"cake_hf.serving.{file}"), kind)
    calls, method = 0, getattr(owned, name)

    def fails(*about: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyError("an injected error")
        return method(*about, **more)

    monkeypatch.setattr(owned, name, fails)
    model = shared_model("llama")
    with expected_faults(), stepping(model, filled_store(model, IDS[:, : CHUNK * 4 + 1])) as steps:
        for number, ids in enumerate(COMPANY):
            steps.manager.add_request(ids, request_id=str(number))
        steps.run()
        assert [steps.tokens(str(number)) for number in range(len(COMPANY))] == plain_company()
        assert whole(steps)
        steps.add("next", DOCUMENT[::-1])
        steps.run()
        assert len(steps.tokens("next")) == 5
    assert calls


def test_a_closed_manager_says_so() -> None:
    model = shared_model("llama")
    with stepping(model, MemoryStore()) as steps:
        steps.manager.close()
        with pytest.raises(CakeError, match="closed"):
            steps.manager.add_request(DOCUMENT)
        steps.manager.close()
