"""`python -m benchmarks stores`: that it runs on whatever there is, notices wrong bytes, and that its arithmetic is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures import Figure, Goal, Result
from benchmarks.servers import Unavailable
from benchmarks.stores import command as stores_command
from benchmarks.stores import contenders
from benchmarks.stores.command import measure_all
from benchmarks.stores.own_cluster import from_json
from benchmarks.stores.race import Contender, race
from benchmarks.stores.values import StoreSettings, Values, WrongBytes
from cake_hf import StoreError
from cake_hf.chunks.codec import check_file
from cake_hf.stores import MemoryStore
from commands import run_benchmark

TINY = StoreSettings(chunks=2, layers=1, tokens=16, repeats=2)
SMALL = ["--quick", "--repeats", 1, "--chunks", 2, "--layers", 1]


@pytest.fixture
def values() -> Values:
    return Values(TINY)


def test_the_stores_that_need_no_server_are_measured(tmp_path: Path) -> None:
    only = [word for name in ("local", "memory", "pack", "tiers") for word in ("--only", name)]
    out = tmp_path / "out.json"
    run = run_benchmark("stores", *SMALL, *only, "--folder", tmp_path / "stores", "--out", out)
    assert run.exit_code == 0, run.output
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == outcome
    assert outcome.keys() == {"machine", "settings", "results", "left_out", "failures", "seconds"}
    assert outcome["results"].keys() == {"local", "memory", "pack", "tiers"}
    for figures in outcome["results"].values():
        for threads in (1, 2):
            assert figures[f"store_{threads}"]["unit"] == "GB/s"
            assert figures[f"share_{threads}"]["goal"] == ">= 0.8"
    assert list((tmp_path / "stores").iterdir()) == []  # nothing is left behind
    assert str(tmp_path) not in run.stdout


@pytest.mark.parametrize("name", ["redis", "s3", "hub"])
def test_the_stores_behind_a_server_are_measured(name: str) -> None:
    """Where a server is missing it is left out with the reason; that it is there is seen to by the stores' own tests."""
    run = run_benchmark("stores", *SMALL, "--only", name, "--json")
    assert run.exit_code == 0, run.output
    outcome = json.loads(run.stdout)
    if name in outcome["left_out"]:
        pytest.skip(outcome["left_out"][name])
    raw = {"redis": {"bare_socket", "redis-py"}, "s3": {"get_ranges", "get"}, "hub": {"get_and_blake3"}}[name]
    assert outcome["results"][name].keys() >= {f"{way}_2" for way in (*raw, "store", "share")}


def test_what_cannot_be_had_is_left_out_and_what_fails_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> Any:
        raise Unavailable("no such server here")

    def broken(*_: object, **__: object) -> Any:
        raise StoreError("the disk is full")

    monkeypatch.setattr(stores_command.remote, "redis", missing)
    fine = run_benchmark("stores", *SMALL, "--only", "redis", "--only", "memory")
    assert fine.exit_code == 0, fine.output
    assert "redis was left out: no such server here" in fine.stdout
    outcome = json.loads(fine.stdout.splitlines()[-1])
    assert outcome["left_out"] == {"redis": "no such server here"}
    assert outcome["results"].keys() == {"memory"}
    monkeypatch.setattr(stores_command.remote, "redis", broken)
    bad = run_benchmark("stores", *SMALL, "--only", "redis")
    assert bad.exit_code == 1
    assert json.loads(bad.stdout.splitlines()[-1])["failures"] == ["redis: the disk is full"]


def test_an_unknown_store_is_named() -> None:
    run = run_benchmark("stores", "--only", "tape")
    assert run.exit_code == 2
    assert "choose from local, memory, redis, s3, mooncake, pack, hub, tiers" in " ".join(run.output.split())


class Liar(MemoryStore):
    """Says that it has read, and has not."""

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        return sum(part.nbytes for part in parts)


class Flipper(MemoryStore):
    """One bit of the last piece is wrong."""

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        count = super().read_into(key, parts)
        parts[-1][-1] ^= 1
        return count


@pytest.mark.parametrize("kind", [Liar, Flipper])
def test_wrong_bytes_are_noticed(kind: type[MemoryStore], values: Values) -> None:
    store = kind()
    contenders.fill(store, values)
    with pytest.raises(WrongBytes, match="did not come back as it was written"):
        race(Contender("a store", store, {"nothing": lambda number: None}), values, TINY)


def test_a_lost_chunk_is_a_failure(values: Values) -> None:
    result = measure_all(
        {"empty": lambda: race(Contender("empty", MemoryStore(), {"nothing": lambda n: None}), values, TINY)},
        lambda line: None,
    )[0]
    assert "has lost a chunk" in result["failures"][0]


def test_the_share_is_of_the_fastest_way(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"fast": 1.0, "slow": 4.0, "store": 2.0}
    monkeypatch.setattr("benchmarks.stores.race._timed", lambda name, *_: seconds[name])
    nothing = {name: (lambda number: None) for name in ("fast", "slow")}
    figures = race(Contender("a store", MemoryStore(), nothing), values, TINY).figures
    assert figures["share_1"].value == 0.5
    assert figures["share_2"].met is False
    assert figures["slow_1"].value == pytest.approx(values.total / 4 / 1e9)


def test_the_values_are_chunk_files_as_a_cache_has_them(values: Values) -> None:
    for key, file, parts in zip(values.keys, values.files, values.parts, strict=True):
        check_file(file, key)
        assert sum(part.nbytes for part in parts) == len(file) == values.nbytes
    assert len(values.parts[0]) == 1 + 2 * TINY.layers


def test_a_result_survives_the_way_out_of_another_process() -> None:
    share = Figure("share", 0.9, 0.8, 1.0, "x", Goal(0.8, at_most=False))
    result = Result("a title", {"a": share, "b": Figure("b", 1.0, 1.0, 1.0, "GB/s")})
    assert from_json(json.loads(json.dumps(asdict(result)))) == result
