"""A restore holds its prompt's KV and little more: what a fresh process's resident memory says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks import memory
from benchmarks.models import build_model, build_prompt
from benchmarks.settings import Settings, Shape
from benchmarks.workbench import Workbench

CHUNKS = 16
SHAPE = Shape(hidden=256, layers=4, heads=4, kv_heads=4, intermediate=256, vocabulary=256)
"""A chunk's KV is 2 MiB, large beside what a process takes now and then for other reasons."""
FORWARD_CHUNKS = 4
"""What the working memory of this model's forward may come to in chunks, of which the largest was seen to take 3.4."""


def test_beside_the_kv_there_are_at_most_three_chunks_per_loader(tmp_path: Path) -> None:
    settings = Settings(shape=SHAPE, tokens=CHUNKS * 256, chunk_size=256, dtype="float32", repeats=1)
    bench = Workbench(settings, build_model(settings), build_prompt(settings), tmp_path)
    result = memory.measure(bench)
    if not result.figures:
        pytest.skip(str(result.details["reason"]))
    (looks,) = cast(list[dict[str, Any]], result.details["looks"])
    threads = settings.limits.loader_threads
    assert 3 * threads + FORWARD_CHUNKS < CHUNKS, "else a second copy of all would go unnoticed"
    for strategy, forward in (("load", 0), ("both", FORWARD_CHUNKS)):
        look = looks[strategy]
        assert look["chunk_bytes"] == 2 * 2**20
        assert look["extra_bytes"] <= (3 * threads + forward) * look["chunk_bytes"], strategy
