"""`cake-hf gc`: what goes, what stays, what it says and its exit codes."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from cake_hf.cli.gc import collect, select
from cake_hf.stores import LocalStore
from cake_hf.testing.contract import key_of, value_of
from cake_hf.util.sizes import parse_bytes, parse_seconds, parse_share
from commands import flat, no_progress, run_command
from lent import Lend
from test_eviction import chunk

pytest_plugins = ["lent"]

DAY = 86_400.0
LEFTOVER = f"{key_of(11)}.0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Ten chunks of 1,000 bytes; number n was used n days ago."""
    store, now = LocalStore(tmp_path / "store"), time.time()
    for number in range(10):
        store.write(key_of(number), [value_of(number)])
        use(store, number, now - number * DAY)
    return store


def use(store: LocalStore, number: int, when: float) -> None:
    os.utime(store.root / key_of(number)[:2] / f"{key_of(number)}.safetensors", (when, when))


def left(store: LocalStore) -> list[int]:
    return [number for number in range(10) if store.contains([key_of(number)])[0]]


def test_what_was_not_used_for_long_goes(store: LocalStore) -> None:
    result = run_command("gc", store.root, "--older-than", "6.5d")
    assert result.exit_code == 0, result.output
    assert left(store) == [0, 1, 2, 3, 4, 5, 6]
    assert "not used for 6.5d 3 chunks 2.9 KiB" in flat(result.output)
    assert "3 chunks deleted" in result.output


def test_the_least_recently_used_goes_for_a_budget(store: LocalStore) -> None:
    result = run_command("gc", store.root, "--budget", "4.5KB")
    assert result.exit_code == 0, result.output
    assert left(store) == [0, 1, 2, 3]
    assert "in the store 10 chunks 9.8 KiB" in flat(result.output)
    assert "over the budget 6 chunks" in flat(result.output)
    assert "left 4 chunks 3.9 KiB" in flat(result.output)


def test_age_comes_before_the_budget(store: LocalStore) -> None:
    result = run_command("gc", store.root, "--budget", "5KB", "--older-than", "3.5d")
    assert result.exit_code == 0, result.output
    assert left(store) == [0, 1, 2, 3]
    assert "over the budget 0 chunks" in flat(result.output)


def test_a_dry_run_deletes_nothing(store: LocalStore) -> None:
    (store.root / "partial" / LEFTOVER).write_bytes(b"half")
    result = run_command("gc", store.root, "--budget", "1KB", "--dry-run")
    assert result.exit_code == 0
    assert "left 1 chunk " in flat(result.output)
    assert "dry run" in result.output
    assert len(left(store)) == 10


def test_a_store_within_its_limits_loses_nothing(store: LocalStore) -> None:
    result = run_command("gc", store.root, "--budget", "1GB", "--older-than", "30d")
    assert result.exit_code == 0
    assert "0 chunks deleted" in result.output
    assert len(left(store)) == 10


def test_front_first_takes_the_front(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for index in range(6):
        store.write(key_of(index), [chunk(index, index, key_of(index - 1) if index else "0" * 40)])
        use(store, index, time.time() - index * DAY)
    budget = 3 * len(chunk(0, 0, ""))
    for eviction, stay in (("front-first", [3, 4, 5]), ("lru", [3])):
        result = run_command("gc", tmp_path, "--budget", budget, "--eviction", eviction)
        assert result.exit_code == 0, result.output
        assert left(store) == stay
        budget //= 3


def test_a_chunk_that_is_used_meanwhile_stays(store: LocalStore) -> None:
    selection = select(store, 5000, None, "lru", time.time(), no_progress)
    store.read(key_of(8))
    collected = collect(store, selection, no_progress)
    assert left(store) == [0, 1, 2, 3, 4, 8]
    assert (collected.in_use, collected.failed) == (1, {})


def test_a_chunk_that_is_gone_meanwhile_is_gone(store: LocalStore) -> None:
    selection = select(store, 8000, None, "lru", time.time(), no_progress)
    store.delete(key_of(9))
    collected = collect(store, selection, no_progress)
    assert left(store) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert (collected.in_use, collected.failed) == (0, {})


def test_what_cannot_be_deleted_is_said(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def refuse(path: str, **options: int) -> None:
        if key_of(8) in str(path):
            raise OSError(errno.EACCES, "no")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    result = run_command("gc", store.root, "--budget", "8KB")
    assert result.exit_code == 1
    assert "1 chunk could not be deleted" in result.output
    assert "lack the permission" in flat(result.output)
    assert left(store) == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_leftovers_of_killed_writers_are_removed(store: LocalStore, lend: Lend) -> None:
    (store.root / "partial" / LEFTOVER).write_bytes(b"half")
    result = run_command("gc", lend(lambda: store), "--budget", "1GB")
    assert "1 file of killed writers removed" in flat(result.output)
    assert list((store.root / "partial").iterdir()) == []


def test_gc_keeps_the_account_of_a_budget(store: LocalStore) -> None:
    LocalStore(store.root, budget=10**6).write(key_of(10), [value_of(10)])
    run_command("gc", store.root, "--budget", "4KB")
    assert int((store.root / "bytes").read_text()) == 4000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "Say what may be deleted"),
        (("--budget", "lots"), "like 4GB"),
        (("--older-than", "1y"), "like 30d"),
        (("--budget", "1GB", "--eviction", "random"), "choose one of lru, front-first"),
    ],
)
def test_bad_arguments(store: LocalStore, arguments: tuple[str, ...], complaint: str) -> None:
    result = run_command("gc", store.root, *arguments)
    assert result.exit_code == 2
    assert complaint in flat(result.stderr)
    assert len(left(store)) == 10


def test_no_store_and_no_directory(tmp_path: Path) -> None:
    result = run_command("gc", tmp_path / "missing", "--budget", "1GB")
    assert (result.exit_code, (tmp_path / "missing").exists()) == (2, False)
    result = run_command("gc", "memory:", "--budget", "1GB")
    assert result.exit_code == 2
    assert "works on directories only" in flat(result.stderr)


@pytest.mark.parametrize("name", ["ls", "info", "verify", "gc"])
def test_commands_that_only_look_do_not_count_as_a_use(store: LocalStore, name: str) -> None:
    """Otherwise a nightly check would make all chunks equally young."""
    before = {entry.key: entry.used for entry in store.entries()}
    run_command(name, store.root, *(["--budget", "1GB"] if name == "gc" else []))
    assert {entry.key: entry.used for entry in store.entries()} == before


# What people write.


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1", 1), ("100B", 100), ("1.5kb", 1500), (" 20 GB ", 20 * 10**9), ("512MiB", 2**29), ("2TiB", 2**41)],
)
def test_a_size_is_parsed_to_bytes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4XB", "1e9", "0", "0.1B", "4GB more", "5%"])
def test_text_that_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="like 4GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("12h", 43_200), ("30d", 30 * DAY), ("2W", 14 * DAY)]
)
def test_an_age_is_parsed_to_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "0d", "-1d", "1y", "d"])
def test_text_that_is_not_an_age_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="like 30d"):
        parse_seconds(text)


def test_a_share_is_a_percentage_above_0_and_up_to_100() -> None:
    assert [parse_share(text) for text in ("5%", "100%", "0.5 %")] == [0.05, 1.0, 0.005]
    for text in ("", "5", "0%", "101%", "-5%", "0.05", "5%%"):
        with pytest.raises(ValueError, match="like 5%"):
            parse_share(text)
