"""A cache with `codec="lossless"`: fewer bytes in the store, and not one bit changes in what a model gives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import cake_hf
from cake_hf import CakeCache, Limits, LocalStore, MemoryStore, Store
from cake_hf.chunks.encoded_header import is_encoded
from cake_hf.model.kv_layout import kv_template
from cake_hf.stores.tiers import TierStore
from cake_hf.testing import GateStore, ThrottledStore, WrapperStore
from families import family_model, here
from family_runs import IDS as FAMILY_IDS
from family_runs import difference as family_difference
from family_runs import generate
from forwards import meeting_at
from models import CHUNK, CHUNKS, Outcome, difference, oracle, prompt, run, shared_model
from stored import chunks_of, key_in, values_of

FAMILIES = ("llama", "qwen2", "qwen3", "gpt_neox")
"""Qwen2 has biased keys."""

ONE_LOADER = Limits.from_environment(loader_threads=1)


class Counting(WrapperStore):
    """Counts reads by method, and what they bring."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.reads: list[str] = []
        self.nbytes = 0

    def read_gradually(self, key: str, parts: Sequence[memoryview], arrived: Any) -> int | None:
        self.reads.append("in place")
        return self.inner.read_gradually(key, parts, arrived)

    def read_up_to(self, key: str, buffer: memoryview) -> int | None:
        self.reads.append("whole")
        return self.inner.read_up_to(key, buffer)

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        self.reads.append("range")
        self.nbytes += sum(part.nbytes for part in parts)
        return self.inner.read_range(key, parts, offset)


def model_of(family: str = "llama", dtype: str = "bfloat16") -> torch.nn.Module:
    return shared_model(family, dtype)


@cache
def expected(family: str = "llama", dtype: str = "bfloat16") -> Outcome:
    return oracle(model_of(family, dtype), prompt())


def filled(store: Store, codec: str = "lossless", family: str = "llama", dtype: str = "bfloat16") -> Store:
    """The store, with the prompt's chunks saved by that codec."""
    with CakeCache(model_of(family, dtype), store, chunk_size=CHUNK, codec=codec) as saving:
        saving.prefill(prompt(), whole=True)
        assert saving.flush(60)
        assert saving.report.chunks_saved == CHUNKS
    return store


@cache
def saved(codec: str, dtype: str) -> dict[str, bytes]:
    """What a cache with that codec saves."""
    return values_of(filled(MemoryStore(), codec, dtype=dtype))


def copy_of(codec: str = "lossless", dtype: str = "bfloat16") -> MemoryStore:
    """A new store with the prompt's chunks, saved by that codec."""
    store = MemoryStore()
    for key, value in saved(codec, dtype).items():
        store.write(key, [value])
    return store


def loaded(store: Store, codec: str = "none", family: str = "llama", **options: Any) -> tuple[Outcome, Any]:
    """What a run with that store gives, and its report."""
    model = model_of(family)
    with CakeCache(model, store, chunk_size=CHUNK, codec=codec, strategy="load", **options) as cache:
        outcome = run(model, prompt(), cache)
        cache.flush(60)
        return outcome, cache.report


# Bit for bit.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_cold_and_warm_are_exact(family: str, kind: str, tmp_path: Path) -> None:
    store = MemoryStore() if kind == "memory" else LocalStore(tmp_path)
    model = model_of(family)
    with CakeCache(model, store, chunk_size=CHUNK, codec="lossless") as cold:
        assert difference(run(model, prompt(), cold), expected(family)) == ""
        assert cold.flush(60)
        stored = cold.report.bytes_stored
    assert all(map(is_encoded, chunks_of(store).values()))
    assert stored == sum(map(len, chunks_of(store).values()))
    for codec in ("none", "lossless", "auto"):
        outcome, report = loaded(store, codec, family)
        assert difference(outcome, expected(family)) == ""
        assert (report.chunks_loaded, report.chunks_failed, report.bytes_stored) == (CHUNKS, 0, stored)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_meeting_point_is_exact(family: str) -> None:
    model, store = model_of(family), filled(MemoryStore(), family=family)
    for meeting in range(1, CHUNKS):
        gate = GateStore(store)
        with CakeCache(model, gate, chunk_size=CHUNK, save=False, limits=ONE_LOADER, codec="lossless") as cache:
            kv_template(model)  # runs the model once, which must not count
            with meeting_at(model, gate, meeting, CHUNKS - meeting):
                outcome = run(model, prompt(), cache)
            assert (cache.report.chunks_computed, cache.report.chunks_loaded) == (meeting, CHUNKS - meeting)
        assert difference(outcome, expected(family)) == "", f"met at {meeting}"


@pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these
@pytest.mark.parametrize("family", here("gemma3", "mistral", "qwen3_next", "lfm2", "deepseek_v3"))
def test_windows_states_and_latents_are_exact(family: str) -> None:
    model: Any = family_model(family, torch.bfloat16)
    plain = generate(model, DynamicCache(config=model.config), FAMILY_IDS, prefill_chunk_size=CHUNK)
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK, codec="lossless") as cold:
        assert family_difference(generate(model, cold), plain) == ""
        assert cold.flush(60)
    kept = chunks_of(store)
    assert kept
    assert all(map(is_encoded, kept.values()))
    for strategy in ("load", "both"):
        with CakeCache(model, store, chunk_size=CHUNK, codec="lossless", strategy=strategy, save=False) as warm:
            assert family_difference(generate(model, warm), plain) == ""
            assert warm.report.chunks_failed == 0
            assert strategy == "both" or warm.report.chunks_loaded == len(kept)


def test_float32_is_stored_as_it_is_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    store = filled(MemoryStore(), family="qwen3", dtype="float32")
    assert not any(map(is_encoded, chunks_of(store).values()))
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in told] == [
        "Chunks are stored as they are: the codec encodes bfloat16 only. This is torch.float32."
    ]


@pytest.mark.fault(
    "KV", "The codec gives other KV than it was given.", "The chunk is stored as it is; a line in the log."
)
@pytest.mark.parametrize("sin", ["changes a base", "changes a refinement", "raises"])
def test_what_does_not_decode_to_the_same_is_stored_as_it_is(
    sin: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cake_hf.chunks import stored_forms

    encode = stored_forms.encode

    def wrong(*arguments: Any) -> Any:
        if sin == "raises":
            raise ValueError("an injected fault")
        encoded = encode(*arguments)
        part = encoded.bases if sin == "changes a base" else encoded.refinements
        part[len(part) // 2] ^= 1
        return encoded

    monkeypatch.setattr(stored_forms, "encode", wrong)
    store = filled(MemoryStore())
    assert not any(map(is_encoded, chunks_of(store).values()))
    assert "A chunk is stored as it is, since encoding it failed." in caplog.text
    outcome, report = loaded(store)
    assert difference(outcome, expected()) == ""
    assert report.chunks_loaded == CHUNKS


# Which form is stored.


def test_auto_encodes_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    for store, encodes in (
        (MemoryStore(), False),
        (WrapperStore(MemoryStore()), False),
        (TierStore([MemoryStore(), MemoryStore()]), False),
        (LocalStore(tmp_path / "one"), True),
        (TierStore([MemoryStore(), LocalStore(tmp_path / "two")]), True),
        (ThrottledStore(MemoryStore(), 1e9), True),
    ):
        filled(store, "auto")
        assert set(map(is_encoded, chunks_of(store).values())) == {encodes}, store
    assert not any(map(is_encoded, chunks_of(filled(MemoryStore(), "none")).values()))


def test_auto_needs_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cake_hf.restore import bound_store

    monkeypatch.setattr(bound_store, "is_native", lambda: False)
    assert not any(map(is_encoded, chunks_of(filled(LocalStore(tmp_path), "auto")).values()))


@pytest.mark.parametrize("codec", ["zip", "", "Lossless", None, 3])
def test_an_unknown_codec_lists_those_that_there_are(codec: Any) -> None:
    with pytest.raises(ValueError, match="choose one of none, lossless, auto"):
        CakeCache(model_of(), MemoryStore(), codec=codec)
    with pytest.raises(ValueError, match="choose one of none, lossless, auto"):
        cake_hf.generate(model_of(), prompt(), store=MemoryStore(), codec=codec)


def test_generate_takes_it() -> None:
    store = MemoryStore()
    cake_hf.generate(model_of(), prompt(), store=store, chunk_size=CHUNK, codec="lossless", max_new_tokens=1)
    assert all(map(is_encoded, chunks_of(store).values()))


# How it is read.


def mixed(encoded: Sequence[int]) -> MemoryStore:
    """A store with these chunks encoded, the others not."""
    store = MemoryStore()
    forms = {"lossless": chunks_of(copy_of()), "none": chunks_of(copy_of("none"))}
    for index in range(CHUNKS):
        value = forms["lossless" if index in encoded else "none"][index]
        store.write(key_in(value), [value])
    return store


@pytest.mark.parametrize("encoded", [(), (7,), (0,), (0, 2, 4, 6), (4, 5, 6, 7), range(8)], ids=str)
@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_a_store_may_mix_both_forms(encoded: Sequence[int], codec: str) -> None:
    outcome, report = loaded(mixed(encoded), codec)
    assert difference(outcome, expected()) == ""
    assert (report.chunks_loaded, report.chunks_failed, report.chunks_saved) == (CHUNKS, 0, 0)


def test_raw_chunks_are_read_into_place_at_once() -> None:
    store = Counting(copy_of("none"))
    loaded(store, limits=ONE_LOADER)
    assert store.reads == ["in place"] * CHUNKS


def test_a_wrong_guess_costs_one_more_read() -> None:
    store = Counting(copy_of())
    loaded(store, limits=ONE_LOADER)
    assert store.reads == ["in place"] + ["whole"] * CHUNKS
    store.reads.clear()
    loaded(store, limits=ONE_LOADER)
    assert store.reads == ["whole"] * CHUNKS
    again = Counting(copy_of("none"))
    loaded(again, "lossless", limits=ONE_LOADER)
    assert again.reads == ["whole"] + ["in place"] * (CHUNKS - 1)


def test_tiers_bring_encoded_chunks_nearer(tmp_path: Path) -> None:
    near, far = MemoryStore(), filled(LocalStore(tmp_path))
    with TierStore([near, far]) as store:
        outcome, report = loaded(store, "lossless")
        assert difference(outcome, expected()) == ""
        assert report.chunks_loaded == CHUNKS
        assert store.flush(60)
    assert chunks_of(near) == chunks_of(far)


# What is wrong with a chunk.


def spoiled(store: MemoryStore, index: int, change: Any) -> None:
    value = bytearray(chunks_of(store)[index])
    store.write(key_in(bytes(value)), [change(value)], replace=True)


def flip(at: float) -> Any:
    def change(value: bytearray) -> bytearray:
        value[min(len(value) - 1, int(len(value) * at))] ^= 1
        return value

    return change


def in_the_header(value: bytearray) -> bytearray:
    value[400] ^= 1
    return value


@pytest.mark.fault("KV", "An encoded chunk is damaged.", "It is computed instead, counted as failed, and replaced.")
@pytest.mark.parametrize(
    "change",
    [flip(0.55), flip(0.8), flip(1.0), in_the_header, lambda value: value[:-1], lambda value: value + b"\0",
     lambda value: value[:5000], lambda value: value[:3], lambda value: bytearray(len(value))],
    ids=["base", "middle", "refinement", "header", "short", "long", "cut", "stub", "zeros"],
)  # fmt: skip
@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_a_damaged_chunk_is_computed(change: Any, codec: str) -> None:
    store = copy_of()
    spoiled(store, 5, change)
    outcome, report = loaded(store, codec)
    assert difference(outcome, expected()) == ""
    assert (report.chunks_loaded, report.chunks_failed, report.chunks_saved) == (CHUNKS - 1, 1, 1)
    outcome, report = loaded(store, codec)
    assert (report.chunks_loaded, report.chunks_failed) == (CHUNKS, 0)


@pytest.mark.fault("KV", "An encoded chunk of another prompt lies under a chunk's key.", "It is computed instead.")
def test_a_chunk_of_another_key_is_computed() -> None:
    store = copy_of()
    all_values = chunks_of(store)
    store.write(key_in(all_values[5]), [all_values[4]], replace=True)
    outcome, report = loaded(store)
    assert difference(outcome, expected()) == ""
    assert (report.chunks_loaded, report.chunks_failed) == (CHUNKS - 1, 1)


def newer(value: bytearray) -> bytearray:
    """The chunk in a format of which nothing but the version can be read."""
    text = bytes(value).replace(b'"version":"3"', b'"version":"4"').replace(b'"version":"2"', b'"version":"4"')
    return bytearray(text.replace(b'"checksums"', b'"digests__"'))


@pytest.mark.fault(
    "KV", "A chunk is of a later format version.", "It is computed instead, counted as missed, and left as it is."
)
@pytest.mark.parametrize("form", ["none", "lossless"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("codec", ["none", "lossless"])
@pytest.mark.parametrize("more", [b"", b"\0" * 10_000])
def test_a_newer_chunk_is_a_miss(
    form: str, dtype: str, codec: str, more: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = copy_of(form, dtype)
    spoiled(store, 5, lambda value: newer(value) + more)
    before, model = values_of(store), model_of(dtype=dtype)
    caplog.clear()
    with CakeCache(model, store, chunk_size=CHUNK, codec=codec, strategy="load") as cache:
        assert difference(run(model, prompt(), cache), expected(dtype=dtype)) == ""
        assert cache.flush(60)
        report = cache.report
    assert (report.chunks_loaded, report.chunks_failed, report.chunks_missed) == (CHUNKS - 1, 0, 1)
    assert values_of(store) == before
    assert "is of format version 4, which this cake_hf does not know" in caplog.text


@pytest.mark.parametrize("form", ["none", "lossless"])
@pytest.mark.parametrize("digit", [b"4", b"6", b"9"])
def test_a_damaged_version_is_no_newer_chunk(form: str, digit: bytes) -> None:
    store = copy_of(form)
    good = values_of(store)

    def change(value: bytearray) -> bytearray:
        at = value.index(b'"version":"') + 11
        return value[:at] + digit + value[at + 1 :]

    spoiled(store, 5, change)
    _, report = loaded(store, form)
    assert (report.chunks_failed, report.chunks_saved) == (1, 1)
    assert values_of(store) == good


# What is compared.


def altered(store: Store) -> MemoryStore:
    """The store with one bit of a base changed in every chunk, and all checksums made right for it."""
    from cake_hf.testing.forgery import forge, one_bit

    other = MemoryStore()
    for value in chunks_of(store).values():
        other.write(key_in(value), [forge(value, one_bit)])
    return other


def test_negative_control() -> None:
    """A well-formed lie is not seen by checksums: the results differ, so the parity tests can fail."""
    store = altered(copy_of())
    assert all(map(is_encoded, chunks_of(store).values()))
    outcome, report = loaded(store)
    assert report.chunks_loaded == CHUNKS
    assert difference(outcome, expected()) != ""
