"""A directory without a budget of its own: how much it may take, who is told, and that nothing that was there goes."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cake_hf import CakeCache, LocalStore, StoreError, open_store
from cake_hf.chunks.codec import stored_bytes
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.model.kv_layout import chunk_layout, kv_template
from cake_hf.stores.default_budget import USUAL, FreeShare
from cake_hf.testing.contract import key_of, value_of
from commands import flat, run_command
from models import CHUNK, prompt, shared_model


class Disk(NamedTuple):
    """As `os.statvfs` tells of it."""

    f_bavail: int
    f_frsize: int = 1
    f_blocks: int = 10**9


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Disk], None]:
    return lambda told: monkeypatch.setattr(os, "statvfs", lambda folder: told)


def total(store: LocalStore) -> int:
    return sum(entry.nbytes for entry in store.entries())


def fill(store: LocalStore, first: int, last: int) -> None:
    for number in range(first, last):
        store.write(key_of(number), [value_of(number)])  # 1,000 bytes each


def opened(folder: Path) -> LocalStore:
    store = open_store(str(folder))
    assert isinstance(store, LocalStore)
    return store


@pytest.mark.fault(
    "Time and bounds",
    "A directory is used as a store without a budget.",
    "It takes a fifth of the free disk at most; what was used longest ago makes room. `cake-hf info` says how much it is.",
)
@pytest.mark.parametrize("spec", [str, Path, Path.as_uri])
def test_a_directory_keeps_to_a_share(
    tmp_path: Path, disk: Callable[[Disk], None], spec: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    disk(Disk(20_000))
    caplog.set_level(logging.INFO, "cake_hf")
    store = open_store(spec(tmp_path / "kv"))  # type: ignore[arg-type]
    assert isinstance(store, LocalStore)
    fill(store, 0, 9)
    assert total(store) == store.budget() == 4_000
    [line] = [record for record in caplog.records if "may take" in record.message]
    assert "may take 3.9 KiB, 20 % of the free disk" in line.message
    assert "budget=4000" in repr(store)


def test_what_is_there_does_not_make_it_smaller(tmp_path: Path, disk: Callable[[Disk], None]) -> None:
    disk(Disk(20_000))
    fill(opened(tmp_path), 0, 4)
    disk(Disk(16_000))  # the store's own 4,000 bytes are not free any more
    assert opened(tmp_path).budget() == 4_000


@pytest.mark.fault(
    "Files",
    "A store was filled beyond a fifth of the disk, without a limit or with a larger one, or others fill the disk.",
    "Opened without a budget, it keeps what it has and grows no further.",
)
def test_chunks_stored_before_a_budget_are_kept(tmp_path: Path, disk: Callable[[Disk], None]) -> None:
    fill(LocalStore(tmp_path, None), 0, 8)
    disk(Disk(100))
    store = opened(tmp_path)
    fill(store, 8, 10)
    assert total(store) == 8_000


@pytest.mark.parametrize("budget", ["budget=none", "budget=NONE"])
def test_no_limit_can_be_asked_for(tmp_path: Path, disk: Callable[[Disk], None], budget: str) -> None:
    disk(Disk(5_000))
    store = open_store(f"{tmp_path.as_uri()}?{budget}")
    assert isinstance(store, LocalStore)
    fill(store, 0, 6)
    assert (store.budget(), total(store)) == (None, 6_000)
    assert not (tmp_path / "bytes").exists()


def test_a_budget_that_is_given_counts(tmp_path: Path, disk: Callable[[Disk], None]) -> None:
    disk(Disk(5_000))
    store = open_store(f"{tmp_path.as_uri()}?budget=3000")
    assert isinstance(store, LocalStore)
    fill(store, 0, 6)
    assert (store.budget(), total(store)) == (3_000, 3_000)


@pytest.mark.parametrize("kind", ["no blocks", "an error"])
def test_where_the_system_does_not_know_there_is_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def ask(folder: object) -> Disk:
        if kind == "an error":
            raise OSError(errno.ENOSYS, "unknown")
        return Disk(0, 1, 0)

    monkeypatch.setattr(os, "statvfs", ask)
    store = opened(tmp_path)
    fill(store, 0, 3)
    assert (store.budget(), total(store)) == (None, 3_000)


def test_asking_for_the_budget_makes_no_directory(tmp_path: Path) -> None:
    store = opened(tmp_path / "kv")
    assert (store.budget() or 0) > 0
    assert repr(store) == f"LocalStore({str(tmp_path / 'kv')!r})"
    assert not (tmp_path / "kv").exists()


@pytest.mark.parametrize("free", [0, 999, 4_999])
def test_a_budget_smaller_than_a_chunk_is_one_sentence(tmp_path: Path, disk: Callable[[Disk], None], free: int) -> None:
    disk(Disk(free))
    with pytest.raises(StoreError, match=r"^A chunk of 1,000 bytes is over .* \(20 % of the free disk\); raise it\.$"):
        fill(opened(tmp_path), 0, 1)


def test_processes_agree(tmp_path: Path, disk: Callable[[Disk], None]) -> None:
    """The second one finds the account of the first, and looks at the directory only where room is needed."""
    disk(Disk(20_000))
    one, other = opened(tmp_path), opened(tmp_path)
    for number in range(12):
        (one, other)[number % 2].write(key_of(number), [value_of(number)])
    assert total(one) <= 4_000
    assert int((tmp_path / "bytes").read_text()) == total(one)


def test_a_store_can_be_given_another_share_of_the_disk(tmp_path: Path, disk: Callable[[Disk], None]) -> None:
    disk(Disk(10_000))
    store = LocalStore(tmp_path, FreeShare(0.5))
    fill(store, 0, 7)
    assert total(store) == 5_000
    assert str(USUAL) == "20 % of the free disk"


def test_info_says_how_much_it_may_take(tmp_path: Path, disk: Callable[[Disk], None]) -> None:
    disk(Disk(50 * 2**20))
    fill(opened(tmp_path), 0, 1)
    assert "may take 10.0 MiB, 20 % of the free disk" in flat(run_command("info", tmp_path).stdout)


def test_warm_tells_the_budget_of_a_new_store(tmp_path: Path, disk: Callable[[Disk], None]) -> None:
    disk(Disk(50 * 2**20))
    (tmp_path / "text.txt").write_text("remember otter = jade\n" * 30)
    for told in (True, False):
        result = run_command(
            "warm", "recall-tiny", tmp_path / "text.txt", "--store", tmp_path / "kv", "--chunk-size", 16
        )
        assert result.exit_code == 0, result.output
        assert ("kv is a new store. It may take 10.0 MiB, 20 % of the free disk" in flat(result.stdout)) == told


@pytest.mark.parametrize("kind", ["LocalStore", "CakeCache", "tiers"])
def test_a_directory_that_is_opened_in_code_keeps_to_it_too(
    tmp_path: Path, disk: Callable[[Disk], None], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once per store and process it is logged, not as a warning."""
    disk(Disk(20 * stored_bytes(session_layout())))
    caplog.set_level(logging.INFO, "cake_hf")
    model, ids = shared_model("llama"), prompt(6 * CHUNK + 1)
    for _ in range(2):
        store: Any = tmp_path / "kv"
        if kind == "LocalStore":
            store = LocalStore(store)
        if kind == "tiers":
            store = ["memory:1MB", str(store)]
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            cache.prefill(ids, whole=True)
            assert cache.flush(60)
    assert total(LocalStore(tmp_path / "kv", None)) == 4 * stored_bytes(session_layout())
    lines = [record for record in caplog.records if "may take" in record.message]
    assert [line.levelname for line in lines] == ["INFO"]


def session_layout() -> ChunkLayout:
    return chunk_layout(kv_template(shared_model("llama")), CHUNK)


@pytest.mark.fault(
    "Files",
    "A process with the default budget uses a store that others fill beyond it meanwhile.",
    "It deletes nothing of that to become smaller; what was used longest ago makes room for its own new chunks only.",
)
@pytest.mark.parametrize("others", ["no limit", "a larger budget", "copied by hand"])
def test_what_others_bring_meanwhile_stays(tmp_path: Path, disk: Callable[[Disk], None], others: str) -> None:
    disk(Disk(20_000))
    ours = LocalStore(tmp_path)
    fill(ours, 0, 3)
    if others == "copied by hand":
        fill(LocalStore(tmp_path / "elsewhere", None), 10, 19)
        for file in (tmp_path / "elsewhere").rglob("*.safetensors"):
            (tmp_path / file.parent.name).mkdir(exist_ok=True)
            file.rename(tmp_path / file.parent.name / file.name)
    else:
        fill(LocalStore(tmp_path, None if others == "no limit" else 50_000), 10, 19)
    fill(ours, 3, 6)
    assert total(ours) in (12_000, 13_000)  # uncounted bytes are found when room is needed
    assert set(map(key_of, range(4, 6))) <= {entry.key for entry in ours.entries()}


@pytest.mark.parametrize("budget", [1, 999])
def test_a_budget_of_ones_own_smaller_than_a_chunk(tmp_path: Path, budget: int) -> None:
    with pytest.raises(
        StoreError, match=rf"^A chunk of 1,000 bytes is over the store's budget of {budget}; raise it\.$"
    ):
        fill(LocalStore(tmp_path, budget), 0, 1)


@pytest.mark.parametrize(
    "store", ["file://{}/kv?budget=1KB", "memory:1KB", "file://{}/kv?budget=2KB&eviction=front-first"]
)
@pytest.mark.parametrize("more", [(), ("--prompt",), ("--tokens", 5, "--prompt")])
def test_warm_says_it_before_it_computes(tmp_path: Path, store: str, more: tuple[object, ...]) -> None:
    (tmp_path / "text.txt").write_text("remember otter = jade\n" * 30)
    arguments = ("warm", "recall-tiny", tmp_path / "text.txt", "--store", store.format(tmp_path))
    result = run_command(*arguments, "--chunk-size", 16, *more)
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"A chunk of [\d,]+ bytes is over the store's budget of [\d,]+; raise it\.\n", result.stderr)


def test_a_chunk_over_the_budget_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CakeCache(shared_model("llama"), LocalStore(tmp_path, 100), chunk_size=CHUNK) as cache:
        cache.prefill(prompt(6 * CHUNK + 1))
        cache.flush(60)
        assert cache.report.chunks_unsaved > 0
    assert len([record for record in caplog.records if "over the store's budget of 100" in record.message]) == 1
