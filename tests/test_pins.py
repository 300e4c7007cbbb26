"""Pinned chunks stay until their time is over, whatever makes room."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cake_hf import LocalStore, StoreError
from cake_hf.stores import byte_budget
from cake_hf.testing.contract import key_of, value_of
from commands import flat, run_command

SOON = time.time() + 3600


def fill(store: LocalStore, first: int, last: int) -> None:
    for number in range(first, last):
        store.write(key_of(number), [value_of(number)])


def there(store: LocalStore) -> set[int]:
    return {number for number in range(100) if store.contains([key_of(number)])[0]}


@pytest.mark.fault(
    "Time and bounds",
    "Room has to be made, and a chunk is pinned, by this process or by another one just now.",
    "It stays until its time is over; others go, and where nothing else is left, new chunks are not saved.",
)
@pytest.mark.parametrize("eviction", ["lru", "front-first"])
@pytest.mark.parametrize("by", ["itself", "another process"])
def test_what_is_pinned_stays(tmp_path: Path, eviction: str, by: str) -> None:
    store = LocalStore(tmp_path, budget=4000, eviction=eviction)
    fill(store, 0, 5)  # the directory has been looked at, so there is a list of who goes
    assert there(store) == {1, 2, 3, 4}
    pinning = store if by == "itself" else LocalStore(tmp_path)
    assert pinning.pin([key_of(1), key_of(2), key_of(50)], SOON) == 2
    fill(store, 5, 20)
    assert {1, 2} < there(store)
    assert len(there(store)) == 4


def test_nothing_is_saved_where_all_is_pinned(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, budget=2000)
    fill(store, 0, 2)
    store.pin([key_of(0), key_of(1)], SOON)
    with pytest.raises(StoreError, match=r"written, read or pinned; raise the budget\.$"):
        fill(store, 2, 3)
    assert there(store) == {0, 1}


@pytest.mark.parametrize("ends", ["by its date", "by hand", "with the file", "by a delete"])
def test_a_chunk_can_be_evicted_after_its_pin_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    store = LocalStore(tmp_path, budget=2000)
    fill(store, 0, 2)
    store.pin([key_of(0)], SOON)
    assert list(store.pinned()) == [key_of(0)]
    if ends == "by its date":
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 7200)
    elif ends == "by hand":
        assert store.unpin([key_of(0), key_of(1)]) == 1
    elif ends == "with the file":
        (tmp_path / "pins").unlink()
    else:
        assert store.delete(key_of(0))
    fill(LocalStore(tmp_path, budget=2000), 2, 6)
    assert 0 not in there(store)
    assert ends == "by a delete" or not store.pinned()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"no pin\n", b"a" * 40, b"%d\n" % 10**30])
def test_a_file_that_makes_no_sense_pins_nothing(tmp_path: Path, content: bytes) -> None:
    store = LocalStore(tmp_path, budget=2000)
    fill(store, 0, 2)
    (tmp_path / "pins").write_bytes(content)
    assert store.pinned() == {}
    fill(store, 2, 4)
    assert there(store) == {2, 3}
    assert store.pin([key_of(2)], SOON) == 1


def test_a_link_pins_nothing_and_is_replaced(tmp_path: Path) -> None:
    store, elsewhere = LocalStore(tmp_path / "kv", budget=2000), tmp_path / "elsewhere"
    fill(store, 0, 1)
    elsewhere.write_text(f"{key_of(0)} {int(SOON)}\n")
    (tmp_path / "kv" / "pins").symlink_to(elsewhere)
    assert store.pinned() == {}
    store.pin([key_of(0)], SOON + 5)
    assert elsewhere.read_text() == f"{key_of(0)} {int(SOON)}\n"


def test_a_later_pin_replaces_an_earlier_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    fill(store, 0, 2)
    store.pin([key_of(0)], SOON)
    store.pin([key_of(0), key_of(1)], SOON + 99)
    assert set(store.pinned().values()) == {int(SOON + 99) + 1}
    assert byte_budget.MAX_PINS_BYTES > 10**6 * 52


def test_a_store_with_pins_and_without_a_mark_is_a_store(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    fill(store, 0, 1)
    store.pin([key_of(0)], SOON)
    (tmp_path / "cake-hf-store").unlink()
    store.delete(key_of(0))
    assert LocalStore(tmp_path).is_store()
    (tmp_path / "pins").write_text("my own list of pins\n")
    assert not LocalStore(tmp_path).is_store()


@pytest.mark.parametrize("how", [("--budget", "1"), ("--older-than", "1s")])
def test_gc_leaves_what_is_pinned(tmp_path: Path, how: tuple[str, str]) -> None:
    store = LocalStore(tmp_path)
    fill(store, 0, 3)
    store.pin([key_of(1)], SOON)
    for entry in store.entries():
        os.utime(tmp_path / entry.key[:2] / f"{entry.key}.safetensors", (1e9, 1e9))
    told = run_command("gc", tmp_path, *how)
    assert there(store) == {1}
    assert "pinned 1 chunk" in flat(told.stdout)
