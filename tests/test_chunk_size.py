"""How large a chunk is by default."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from cake_hf import CakeCache, MemoryStore
from cake_hf.cli.app import app
from cake_hf.restore.bound_model import chosen_chunk_size
from cake_hf.scheduling.planner import auto_chunk_size, why_chunk_size
from models import build, prompt, run, shared_model


@pytest.mark.parametrize(
    ("kind", "ties", "size"), [("cpu", False, 128), ("cuda", False, 512), ("mps", False, 512), ("cpu", True, 512)]
)
def test_the_default_chunk_size_follows_from_the_device(kind: str, ties: bool, size: int) -> None:
    assert auto_chunk_size(kind, ties_images=ties) == size


@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu"])
def test_the_reason_names_the_chunk_size(kind: str) -> None:
    assert str(auto_chunk_size(kind)) in why_chunk_size(kind)


def test_it_is_the_default_and_in_the_report_and_in_the_key() -> None:
    model, store, ids = shared_model("llama"), MemoryStore(), prompt(300)
    loaded = {}
    for size in ("auto", 128, 64):
        with CakeCache(model, store, chunk_size=size) if size != "auto" else CakeCache(model, store) as cache:
            run(model, ids, cache)
            assert cache.report.chunk_size == (128 if size == "auto" else size)
            assert f"in chunks of {cache.report.chunk_size}" in str(cache.report)
            loaded[size] = cache.report.chunks_loaded + cache.report.chunks_computed - cache.report.chunks_missed
    assert loaded == {"auto": 0, 128: 2, 64: 0}


def test_a_model_whose_images_must_not_be_cut_takes_longer_chunks() -> None:
    model = build("llama")
    assert chosen_chunk_size(model, "auto") == 128
    model.config.model_type = "gemma3"
    assert chosen_chunk_size(model, "auto") == 512


@pytest.mark.fault("Model", "A chunk size is no number, or too small.", "One sentence says what it can be.")
@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("large", "or \"auto\"; got 'large'"),
        ("", 'or "auto"'),
        (16.5, "a number of tokens"),
        (8, "at least 16"),
        (-1, "at least 16"),
    ],
)
def test_an_invalid_chunk_size_is_refused(size: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CakeCache(shared_model("llama"), MemoryStore(), chunk_size=size)


def test_plan_names_the_default_chunk_size(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    numbers = ["--chunks", "8", "--compute-base", "0.1", "--chunk-mib", "4", "--gbps", "1"]
    alone = CliRunner().invoke(app, ["plan", *numbers])
    assert alone.exit_code == 0
    assert "a cache takes" not in alone.output
