"""The hits that are counted beside a store, day by day."""

from __future__ import annotations

from pathlib import Path

import pytest

from cake_hf import CakeCache, Limits, LocalStore, MemoryStore, Report, open_store
from cake_hf.transfer import hits
from cake_hf.transfer.hits import Hits, count_hits, flush_hits, parsed, read_hits
from models import CHUNK, TAIL, prompt, shared_model


def run(store: object, **options: object) -> None:
    with CakeCache(shared_model("llama"), store, chunk_size=CHUNK, **options) as cache:  # type: ignore[arg-type]
        cache.prefill(prompt())


def test_prompts_and_hits_are_counted(tmp_path: Path) -> None:
    for _ in range(3):
        run(tmp_path / "kv")
    [found] = read_hits(tmp_path / "kv" / "notes").values()
    assert (found.prompts, found.with_hits) == (3, 2)
    assert found.tokens == 3 * prompt().shape[1]
    assert found.tokens_loaded == found.chunks_loaded * CHUNK + 2 * TAIL > 2 * TAIL  # the document's end, too
    assert found.bytes_loaded > 0


@pytest.mark.parametrize(("tokens", "boundaries"), [(5, []), (CHUNK + 1, []), (40, [3, 20])])
def test_tails_are_hits_too(tmp_path: Path, tokens: int, boundaries: list[int]) -> None:
    """All of a document that is found counts, also where it is shorter than a chunk."""
    for _ in range(2):
        with CakeCache(shared_model("llama"), tmp_path, chunk_size=CHUNK, strategy="load") as cache:
            cache.prefill(prompt(tokens), boundaries=boundaries)
    [found] = read_hits(tmp_path / "notes").values()
    assert (found.prompts, found.with_hits, found.tokens, found.tokens_loaded) == (2, 1, 2 * tokens, tokens)


def test_a_cache_that_does_not_save_counts_no_hits(tmp_path: Path) -> None:
    run(tmp_path / "kv")
    before = read_hits(tmp_path / "kv" / "notes")
    run(tmp_path / "kv", save=False)
    assert read_hits(tmp_path / "kv" / "notes") == before


def test_the_nearest_directory_of_tiers_counts(tmp_path: Path) -> None:
    run(["memory:1MB", str(tmp_path / "kv")])
    assert sum(found.prompts for found in read_hits(tmp_path / "kv" / "notes").values()) == 1


def test_a_memory_store_counts_no_hits() -> None:
    store = MemoryStore()
    run(store)
    assert flush_hits(store, 1.0)


@pytest.mark.parametrize("text", ["", "\n", "no line", "2026-13 1", "2026-11-30 1 2 3", "2026-11-30 1 1 1 1 1 -1\n"])
def test_lines_that_make_no_sense_are_passed_over(text: str) -> None:
    assert parsed(f"{text}\n2026-11-30 1 1 100 64 4 999\n") == {"2026-11-30": Hits(1, 1, 100, 64, 4, 999)}


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hits, "MAX_FILE_BYTES", 300)
    monkeypatch.setattr(hits, "DAYS_KEPT", 2)
    (tmp_path / "notes").mkdir()
    old = "".join(f"2020-01-0{day} 1 0 10 0 0 0\n" for day in range(1, 6))
    (tmp_path / "notes" / "hits.log").write_text(old)
    store = LocalStore(tmp_path)
    for _ in range(20):
        count_hits(store, Report(tokens=10, chunk_size=4, chunks_loaded=1), Limits())
        assert flush_hits(store, 60.0)
    found = read_hits(tmp_path / "notes")
    assert (tmp_path / "notes" / "hits.log").stat().st_size <= 300
    assert next(iter(found)) == "2020-01-05"
    assert list(found.values())[-1].prompts == 20


def test_a_place_that_cannot_be_written_to_costs_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "kv")
    run(store)
    log = tmp_path / "kv" / "notes" / "hits.log"
    log.unlink()
    log.mkdir()
    run(store)
    assert read_hits(tmp_path / "kv" / "notes") == {}


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    run(tmp_path / "kv")
    log = tmp_path / "kv" / "notes" / "hits.log"
    log.unlink()
    log.symlink_to(elsewhere)
    run(tmp_path / "kv")
    assert elsewhere.read_text() == "mine"


def test_a_batch_counts_its_rows() -> None:
    assert Hits.of(Report(tokens=64, chunk_size=16, batch=4, chunks_loaded=2)) == Hits(4, 2, 64, 32, 2, 0)


def test_a_directory_with_only_our_notes_is_a_store(tmp_path: Path) -> None:
    run(tmp_path / "kv")
    for shard in (tmp_path / "kv").glob("??"):
        for chunk in shard.iterdir():
            chunk.unlink()
    (tmp_path / "kv" / "cake-hf-store").unlink()
    store = open_store(str(tmp_path / "kv"))
    assert isinstance(store, LocalStore)
    assert store.is_store()
