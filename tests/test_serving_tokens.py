"""Continuous batching with a store answers as transformers' own engine does, in float32 token for token."""

from __future__ import annotations

import pytest

from cake_hf import MemoryStore
from engine_runs import CHUNKS, COMPANY, engine_config, needs_engine, plain_company, served
from models import CHUNK, shared_model

pytestmark = needs_engine


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
@pytest.mark.parametrize("page", [CHUNK, CHUNK // 2, CHUNK // 4])
def test_tokens_are_those_of_the_plain_engine(page: int, exact: bool) -> None:
    model, store = shared_model("llama"), MemoryStore()
    for strategy, loaded in (("both", 0), ("load", CHUNKS), ("both", None), ("compute", 0)):
        tokens, reports = served(model, COMPANY, store, engine=engine_config(page), exact=exact, strategy=strategy)
        assert tokens == plain_company()
        report = reports[1]
        assert report.restored == CHUNKS
        assert loaded is None or report.chunks_loaded == loaded
        assert report.chunks_failed == 0
    assert len(list(store.keys())) >= CHUNKS
