"""The bench's looks at single parts: loads into place beside bare reads, and what bookkeeping costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import loading, overheads
from benchmarks.loading import Chunks, load, read_bare
from benchmarks.models import build_model, build_prompt
from benchmarks.settings import Settings, shape_named
from benchmarks.workbench import Workbench
from cake_hf import CakeError, LocalStore

CHUNK, CHUNKS = 32, 4


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    settings = Settings(
        shape=shape_named("tiny"),
        tokens=CHUNK * CHUNKS,
        suffix_tokens=8,
        chunk_size=CHUNK,
        dtype="float32",
        repeats=1,
        stored_files=600,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Workbench(settings, build_model(settings), build_prompt(settings), tmp_path)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_loaders_and_bare_reads_bring_the_same_bytes_to_the_same_places(bench: Workbench, threads: int) -> None:
    chunks = Chunks.of(bench)
    ours, bare = chunks.memory(), chunks.memory()
    load(chunks, threads, ours)
    read_bare(chunks, threads, bare)
    with bench.cache(bench.filled_store(), strategy="load") as cache:
        cache.prefill(bench.ids)
        expected = [tensor.transpose(1, 2) for layer in cache.layers for tensor in (layer.keys, layer.values)]
        for one, other, right in zip(ours, bare, expected, strict=True):
            assert torch.equal(one, right)
            assert torch.equal(other, right)


def test_a_chunk_that_is_gone_is_no_measurement(bench: Workbench) -> None:
    chunks = Chunks.of(bench)
    chunks.store.delete(chunks.keys[1])
    with pytest.raises(CakeError, match=f"{CHUNKS - 1} of {CHUNKS} chunks could be loaded"):
        load(chunks, 2, chunks.memory())


def test_fresh_memory_is_fresh_each_time(bench: Workbench) -> None:
    chunks = Chunks.of(bench)
    first = chunks.memory()
    first[0].fill_(1.0)
    second = chunks.memory()
    assert first[0].data_ptr() != second[0].data_ptr()
    assert not second[0].any()
    assert sum(buffer.nbytes for buffer in second) == chunks.nbytes


def test_speed_is_bare_time_over_ours(bench: Workbench) -> None:
    result = loading.measure(bench)
    rates = result.details["gigabytes_per_second"]
    assert isinstance(rates, dict)
    assert len(rates) == 8
    speed = result.figures["speed_fresh_2"]
    assert speed.value == pytest.approx(rates["loaders, fresh, 2"] / rates["bare, fresh, 2"])


def test_the_store_is_as_large_as_told_and_gone_afterwards(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[int] = []

    def counted(folder: Path, keys: list[str], count: int) -> None:
        fill(folder, keys, count)
        stored.append(len(list(LocalStore(folder).keys())))

    fill = overheads.fill
    monkeypatch.setattr(overheads, "ROUNDS", 2)
    monkeypatch.setattr(overheads, "fill", counted)
    result = overheads.measure(bench)
    assert stored == [bench.settings.stored_files]
    assert list(bench.folder.iterdir()) == []
    whole, parts = result.figures["named_milliseconds"], ("namespace_milliseconds", "lookup_milliseconds")
    assert whole.value > 0
    assert all(result.figures[name].value > 0 for name in parts)


def test_a_lookup_that_finds_too_little_is_no_measurement(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overheads, "ROUNDS", 1)
    monkeypatch.setattr(overheads, "fill", lambda *arguments: None)
    with pytest.raises(CakeError, match="0 of the prompt's chunks were found, 128 are stored"):
        overheads.measure(bench)


@pytest.mark.parametrize("chunks", [1, 2, 7, 64])
def test_the_two_sides_meet_without_waiting(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    made = []

    class Watched(overheads.Frontier):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            made.append(self)

        def _wait_for(self, index: int) -> None:
            raise AssertionError("the main thread has waited")

    monkeypatch.setattr(overheads, "Frontier", Watched)
    assert overheads.decide_seconds(chunks, layers=3) > 0
    (frontier,) = made
    counts = {state.value: count for state, count in frontier.counts().items()}
    assert set(counts) <= {"computed", "loaded"}
    assert sum(counts.values()) == chunks
    assert chunks == 1 or len(counts) == 2
