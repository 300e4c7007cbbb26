"""Caches with `max_ttft`: only the bases of chunks come where whole ones would come too late, and nothing of that is saved."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import cake_hf
from cake_hf import CakeCache, MemoryStore, Store
from cake_hf.chunks.encoded_header import encoded_header_size, parse_encoded_header
from cake_hf.testing import WrapperStore
from cake_hf.transfer.single_flight import sharing_of
from families import family_model, here
from family_runs import IDS as FAMILY_IDS
from family_runs import generate
from forwards import before_forward
from hurried_runs import (
    AMPLE,
    LATE,
    Line,
    after_bases_of,
    bfloat16_llama,
    cache_for,
    filled,
    hurried,
    key_of,
)
from models import CHUNK, CHUNKS, TAIL, Outcome, difference, oracle, prompt, run, shared_model
from stored import chunks_of, values_of
from waiting import PATIENCE, await_true


def exact() -> Outcome:
    return oracle(bfloat16_llama(), prompt())


# What comes.


@pytest.mark.parametrize("strategy", ["load", "both", "compute"])
def test_with_time_enough_all_is_exact(strategy: str) -> None:
    outcome, report = hurried(filled(), AMPLE, strategy=strategy)
    assert difference(outcome, exact()) == ""
    assert (report.tokens_hurried, report.tokens_lossy, report.chunks_failed) == (0, 0, 0)
    assert strategy != "load" or report.chunks_loaded == CHUNKS


def test_with_no_time_only_the_bases_come(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()
    line = Line(store, monkeypatch)
    outcome, report = hurried(line, LATE)
    assert difference(outcome, after_bases_of(range(CHUNKS))) == ""
    assert difference(outcome, exact()) != ""  # the negative control
    assert (report.chunks_loaded, report.tokens_hurried, report.tokens_lossy) == (CHUNKS, *[CHUNK * CHUNKS] * 2)
    for index, value in chunks_of(store).items():
        metadata, layout = parse_encoded_header(value)
        most = encoded_header_size(layout) + max(metadata.sizes.base_bytes, layout.nbytes * 17 // 32)
        assert line.bytes_of(index) <= most < len(value)


def test_the_report_says_why() -> None:
    _, report = hurried(filled(), LATE)
    assert (
        "lossy       128 tokens, whose KV is not exact: 128 came as near, since all of their KV would have come after max_ttft"
    ) in str(report)
    assert report.as_dict()["tokens_hurried"] == CHUNK * CHUNKS
    assert "max_ttft" not in str(hurried(filled(), AMPLE)[1])


def drops(index: int) -> float:
    """Seconds of a chunk on a line that is slow at first, and again at the end."""
    return {CHUNKS - 1: 300.0, 0: 1e4}.get(index, 1.0)


def test_each_load_is_as_fine_as_the_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of eight chunks takes 300 of 1,000 s, so the second comes rounded; it comes fast, so the others come whole."""
    outcome, report = hurried(Line(filled(), monkeypatch, drops), 1000.0)
    assert difference(outcome, after_bases_of([CHUNKS - 2])) == ""
    assert report.tokens_hurried == CHUNK


def test_what_was_learnt_of_the_line_decides_from_the_first_load_on(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()
    line = Line(store, monkeypatch, lambda index: 10.0)
    for _ in range(2):
        hurried(line, None)
    needed = CHUNKS * 10.0
    assert hurried(line, needed + 9.0)[1].tokens_hurried == 0
    line.reads.clear()
    outcome, report = hurried(line, needed - 9.0)
    assert report.tokens_hurried >= CHUNK
    assert line.bytes_of(CHUNKS - 1) < len(chunks_of(store)[CHUNKS - 1])
    assert difference(outcome, exact()) != ""


# What is computed behind it is not saved, and what is not is.


@pytest.mark.parametrize("hole", [0, 3, CHUNKS - 1])
def test_only_what_saw_exact_kv_is_saved(hole: int) -> None:
    """Of a hole, and a suffix that is a full chunk: a hole before all rounded chunks has seen none."""
    ids = prompt(CHUNK * (CHUNKS + 1))
    store = filled(ids=ids)
    before = values_of(store)
    for index in (hole, CHUNKS):
        store.delete(key_of(store, index))
    _, report = hurried(store, LATE, ids)
    assert (report.chunks_computed, report.chunks_loaded) == (1, CHUNKS - 1)
    assert report.chunks_saved == (hole == 0)
    assert {key: before[key] for key in values_of(store)} == values_of(store)
    assert set(chunks_of(store)) == set(range(CHUNKS)) - ({hole} if hole else set())
    outcome, report = hurried(store, AMPLE, ids)
    assert difference(outcome, oracle(bfloat16_llama(), ids)) == ""
    assert (report.chunks_saved, values_of(store)) == (1 + (hole > 0), before)


def test_an_unhurried_prompt_afterwards_is_exact_and_saves_what_was_left() -> None:
    ids = prompt(CHUNK * CHUNKS)
    store = filled(ids=ids[:, : CHUNK * 5])
    hurried(store, LATE, ids, strategy="load")
    assert set(chunks_of(store)) == set(range(5))
    for max_ttft in (None, AMPLE):
        outcome, report = hurried(store, max_ttft, ids)
        assert difference(outcome, oracle(bfloat16_llama(), ids)) == ""
        assert report.tokens_hurried == 0
    assert set(chunks_of(store)) == set(range(CHUNKS))
    assert values_of(store) == values_of(filled(ids=ids))


def test_turns_behind_rounded_chunks_are_not_saved() -> None:
    model, ids, store = bfloat16_llama(), prompt(), filled()
    before = values_of(store)
    with cache_for(store, LATE, strategy="load") as cache:
        first = run(model, ids, cache)
        assert cache.end_turn() == []
        said = torch.cat([first.tokens, prompt(3 * CHUNK, seed=7)], dim=1)
        run(model, said, cache, attention_mask=torch.ones_like(said))
        assert cache.report.reason_code == "off-schedule"
        cache.end_turn()
        assert cache.flush(60)
    assert values_of(store) == before
    with cache_for(store, None, strategy="load") as cache:  # the negative control
        run(model, ids, cache)
        assert cache.end_turn()
        assert cache.flush(60)
    assert values_of(store) != before


@pytest.mark.parametrize("question", [5, 2 * CHUNK])
def test_a_document_and_a_question_about_it(question: int) -> None:
    """What `prefill` brings in haste is gone on from, and the report is one; the document's tail is not saved."""
    model, ids, store = bfloat16_llama(), prompt(), filled()
    before = values_of(store)
    with cache_for(store, LATE, strategy="load") as cache:
        report = cache.prefill(ids)
        assert (report.tokens_hurried, cache.get_seq_length()) == (CHUNK * CHUNKS, CHUNK * CHUNKS)
        run(model, torch.cat([ids, prompt(question, seed=3)], dim=1), cache)
        assert cache.report.tokens_hurried == CHUNK * CHUNKS
        assert cache.flush(60)
    assert values_of(store) == before


def test_a_cropped_cache_is_known_again_up_to_the_first_rounded_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, store = bfloat16_llama(), prompt(), filled()
    line = Line(store, monkeypatch, drops)
    with cache_for(line, 1000.0, strategy="load") as cache:
        run(model, ids, cache)
        assert cache.report.tokens_hurried == CHUNK
        cache.crop(CHUNK * (CHUNKS - 2) - cache.get_seq_length())
        again = run(model, ids, cache)
        assert cache.report.reason_code != "off-schedule"
    assert difference(again, exact()) == ""


def test_copies_hurry_too() -> None:
    with cache_for(filled(), LATE, strategy="load") as cache:
        other = copy.deepcopy(cache)
        outcome = run(bfloat16_llama(), prompt(), other)
        assert other.report.tokens_hurried == CHUNK * CHUNKS
    assert difference(outcome, after_bases_of(range(CHUNKS))) == ""


# Beside other prompts.


class Held(WrapperStore):
    """Holds the first read of bases alone until it is let go."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.came, self.go_on = threading.Event(), threading.Event()
        self._keys = {key_of(inner, index) for index in chunks_of(inner)}

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        if key in self._keys and not self.came.is_set():
            self.came.set()
            assert self.go_on.wait(PATIENCE)
        return self.inner.read_range(key, parts, offset)


def test_rounded_kv_is_not_handed_to_a_prompt_beside() -> None:
    store = Held(filled())
    found: list[tuple[Outcome, Any]] = []
    haste = threading.Thread(target=lambda: found.append(hurried(store, LATE)), daemon=True)
    haste.start()
    assert store.came.wait(PATIENCE)
    outcome, report = hurried(store, None, limits=cake_hf.Limits(loader_threads=2, read_timeout=PATIENCE))
    store.go_on.set()
    haste.join(PATIENCE)
    assert difference(outcome, exact()) == ""
    assert (report.chunks_loaded, report.chunks_shared) == (CHUNKS, 0)
    assert difference(found[0][0], after_bases_of(range(CHUNKS))) == ""


def test_what_is_computed_behind_rounded_chunks_is_not_handed_on() -> None:
    """A hole is computed behind them, and held there, while another prompt needs the same chunk."""
    hole, model, store = 3, bfloat16_llama(), filled()
    key = key_of(store, hole)
    store.delete(key)
    inside, go_on = threading.Event(), threading.Event()
    haste = threading.Thread(target=lambda: hurried(store, LATE), daemon=True)

    def hold(_: int) -> None:
        if threading.current_thread() is haste and sharing_of(store).reads() == 0 and not inside.is_set():
            inside.set()
            assert go_on.wait(PATIENCE)

    hurried(store, AMPLE, save=False)  # the model is known by now, so the first forward in haste is the hole's
    with cache_for(store, None), before_forward(model, hold):
        haste.start()
        assert inside.wait(PATIENCE)
        assert not sharing_of(store).flights()
        outcome, report = hurried(store, None)
        go_on.set()
        haste.join(PATIENCE)
    assert difference(outcome, exact()) == ""
    assert (report.chunks_computed, report.chunks_shared, report.chunks_saved) == (1, 0, 1)
    assert values_of(store) == values_of(filled())


def test_rows_of_a_batch_come_whole() -> None:
    model, ids = bfloat16_llama(), torch.cat([prompt(), prompt(seed=2)])
    store = filled()
    outcomes = []
    for max_ttft in (LATE, None):
        with cache_for(store, max_ttft, strategy="load", save=False) as cache:
            outcomes.append(run(model, ids, cache))
            assert (cache.report.tokens_hurried, cache.report.chunks_loaded) == (0, CHUNKS)
    assert difference(*outcomes) == ""


def test_equal_rows_are_one_prompt() -> None:
    with cache_for(filled(), LATE, strategy="load") as cache:
        run(bfloat16_llama(), prompt(), cache, num_beams=2)
        assert cache.report.tokens_hurried == 2 * CHUNK * CHUNKS


# The second pass.


def hurries_needlessly(index: int) -> float:
    """Seconds of a chunk on a line that is slow at first."""
    return 300.0 if index == CHUNKS - 1 else 1.0


def test_time_that_is_left_makes_chunks_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(CHUNK * (CHUNKS + 1))
    store = filled(ids=ids[:, : CHUNK * CHUNKS])
    line = Line(store, monkeypatch, hurries_needlessly)
    with cache_for(line, 1000.0, strategy="load") as cache:
        outcome = run(bfloat16_llama(), ids, cache)
        assert cache.end_turn()
        assert cache.flush(60)
        report = cache.report
    assert difference(outcome, oracle(bfloat16_llama(), ids)) == ""
    assert (report.tokens_hurried, report.chunks_saved) == (0, 1)
    assert [(span.actor, span.chunk) for span in report.timeline if span.outcome == "refined"] == [
        ("refine", CHUNKS - 2)
    ]
    whole = len(chunks_of(store)[CHUNKS - 2])
    assert (
        line.bytes_of(CHUNKS - 2) <= whole + CHUNK * 64
    )  # nothing was read twice but where a base was taken for longer


def test_several_chunks_are_refined_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is as slow as it was learnt for two chunks, which come rounded, and fast then."""
    two = cake_hf.Limits(loader_threads=2, read_timeout=1e8, lookup_timeout=60.0)
    seconds = [10.0]
    line = Line(filled(), monkeypatch, lambda index: 10.0 if index >= CHUNKS - 2 else seconds[0])
    for _ in range(2):
        hurried(line, None)
    seconds[0] = 0.0
    outcome, report = hurried(line, 60.0, limits=two)
    assert difference(outcome, exact()) == ""
    assert report.tokens_hurried == 0
    assert [span.outcome for span in report.timeline].count("refined") >= 2


@pytest.mark.fault("KV", "There is no memory to refine a chunk.", "The chunk stays rounded.")
def test_without_memory_a_chunk_stays_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no memory is left")

    line = Line(filled(), monkeypatch, hurries_needlessly)
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", fail)  # how refinements are unpacked
    outcome, report = hurried(line, 1000.0)
    assert difference(outcome, after_bases_of([CHUNKS - 2])) == ""
    assert report.tokens_hurried == CHUNK


def test_what_was_computed_before_a_chunk_was_refined_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole at the end runs behind a rounded chunk. That is then made exact, but what has seen it is not."""
    ids = prompt(CHUNK * (CHUNKS + 1))
    store = filled(ids=ids[:, : CHUNK * (CHUNKS - 1)])
    before = values_of(store)
    line = Line(store, monkeypatch, lambda index: 300.0 if index == CHUNKS - 2 else 1.0)
    with cache_for(line, 1000.0, strategy="load") as cache:
        outcome = run(bfloat16_llama(), ids, cache)
        assert "refined" in [span.outcome for span in cache.report.timeline]
        assert cache.boundaries == []
        cache.end_turn()
        assert cache.flush(60)
        assert (cache.report.tokens_hurried, cache.report.chunks_saved) == (0, 0)
    assert values_of(store) == before
    assert difference(outcome, oracle(bfloat16_llama(), ids)) != ""


@pytest.mark.fault(
    "KV", "A refinement is damaged, and its chunk was loaded without it.", "The chunk stays rounded; a line in the log."
)
def test_a_damaged_refinement_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    store = filled()
    value = bytearray(chunks_of(store)[CHUNKS - 2])
    value[-1] ^= 1
    store.write(key_of(store, CHUNKS - 2), [value], replace=True)
    outcome, report = hurried(Line(store, monkeypatch, hurries_needlessly), 1000.0)
    assert difference(outcome, after_bases_of([CHUNKS - 2])) == ""
    assert report.tokens_hurried == CHUNK
    assert "A stored refinement cannot be used." in caplog.text


@pytest.mark.fault(
    "Stores",
    "A store hangs while a chunk is refined.",
    "The chunk stays rounded once `max_ttft` is over; the read is left.",
)
def test_a_refinement_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled()
    metadata, layout = parse_encoded_header(chunks_of(store)[CHUNKS - 2])
    at = encoded_header_size(layout) + metadata.sizes.base_bytes
    hangs, go_on = threading.Event(), threading.Event()

    class Hanging(Line):
        def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
            if offset == at and key == metadata.facts.key:
                self._passed += 1000.0 - 310.0  # hardly any time is left
                hangs.set()
                assert go_on.wait(PATIENCE)
            return super().read_range(key, parts, offset)

    outcome, report = hurried(Hanging(store, monkeypatch, hurries_needlessly), 1000.0)
    assert hangs.is_set()
    go_on.set()
    assert report.tokens_hurried == CHUNK
    assert difference(outcome, after_bases_of([CHUNKS - 2])) == ""


@pytest.mark.fault(
    "Stores",
    "A store hangs while a chunk is refined, and `max_ttft` is long.",
    "The chunk stays rounded after `read_timeout`, which all waits of the prompt share; the read is left.",
)
def test_a_refinement_that_hangs_costs_no_more_than_any_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what was learnt of the line, the first loads come rounded. It is fast by now, so there is time for the second pass."""
    store, go_on, hung = filled(), threading.Event(), threading.Event()
    places = {}
    for value in chunks_of(store).values():
        metadata, layout = parse_encoded_header(value)
        places[metadata.facts.key] = encoded_header_size(layout) + metadata.sizes.base_bytes

    class Hanging(Line):
        def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
            if offset == places.get(key):
                hung.set()
                go_on.wait(PATIENCE)
            return super().read_range(key, parts, offset)

    seconds = [1000.0]
    line = Hanging(store, monkeypatch, lambda index: seconds[0])
    for _ in range(2):
        hurried(line, None)
    seconds[0] = 0.0
    short = cake_hf.Limits(loader_threads=1, read_timeout=0.5, lookup_timeout=60.0)
    outcome, report = hurried(line, CHUNKS * 1000.0 - 500.0, limits=short)
    assert hung.is_set()
    assert not go_on.is_set()
    go_on.set()
    assert report.tokens_hurried >= CHUNK
    assert difference(outcome, exact()) != ""


# What is not layered, or not whole.


@pytest.mark.parametrize(("dtype", "codec"), [("bfloat16", "none"), ("float32", "lossless")])
def test_raw_chunks_come_whole(dtype: str, codec: str) -> None:
    model = shared_model("llama", dtype)
    store = filled(codec=codec, model=model)
    outcome, report = hurried(store, LATE, model=model)
    assert difference(outcome, oracle(model, prompt())) == ""
    assert (report.chunks_loaded, report.tokens_hurried) == (CHUNKS, 0)


def test_a_store_that_reads_no_ranges_brings_chunks_whole() -> None:
    class Whole(WrapperStore):
        def __init__(self, inner: Store) -> None:
            super().__init__(inner)
            self.reads_ranges = False

    outcome, report = hurried(Whole(filled()), LATE)
    assert difference(outcome, exact()) == ""
    assert (report.chunks_loaded, report.tokens_hurried) == (CHUNKS, 0)


@pytest.mark.fault(
    "KV", "A base is damaged, and its chunk is loaded without its refinement.", "The chunk is computed, and not saved."
)
@pytest.mark.parametrize("sin", ["base", "header", "cut"])
def test_a_damaged_base_is_not_used(sin: str) -> None:
    store = filled()
    metadata, layout = parse_encoded_header(chunks_of(store)[3])
    value = bytearray(chunks_of(store)[3])
    value[{"base": encoded_header_size(layout) + 50, "header": 400, "cut": -1}[sin]] ^= 1
    store.write(metadata.facts.key, [value[: 5000 if sin == "cut" else None]], replace=True)
    before = values_of(store)
    _, report = hurried(store, LATE)
    assert (report.chunks_loaded, report.chunks_computed, report.chunks_failed) == (CHUNKS - 1, 1, 1)
    assert (report.tokens_hurried, values_of(store)) == ((CHUNKS - 1) * CHUNK, before)
    outcome, report = hurried(store, AMPLE)
    assert difference(outcome, exact()) == ""
    assert values_of(store) == values_of(filled())


@pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these
@pytest.mark.parametrize("family", here("gemma3", "mistral", "qwen3_next", "lfm2", "deepseek_v3"))
def test_windows_and_states_behind_rounded_chunks_are_not_saved(family: str) -> None:
    model: Any = family_model(family, torch.bfloat16)
    store = MemoryStore()
    with cache_for(store, None, model) as cold:
        plain = generate(model, cold)
        assert cold.flush(60)
    before = values_of(store)
    longer = torch.cat([FAMILY_IDS, prompt(3 * CHUNK, seed=5)], dim=1)
    with cache_for(store, LATE, model, strategy="load") as cache:
        generate(model, cache, longer)
        assert cache.flush(60)
        assert cache.report.tokens_hurried > 0
    assert values_of(store) == before
    with cache_for(store, None, model, strategy="load", save=False) as cache:
        assert torch.equal(generate(model, cache).logits, plain.logits)


# What bad input gets.

NOT_LAYERED = "With codec {!r}, chunks have no part that max_ttft could leave out; take codec='lossless' or 'auto'."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_ttft": 0.0}, "max_ttft must be positive, and at most 1,000,000 s; got 0.0."),
        ({"max_ttft": -1}, "max_ttft must be positive, and at most 1,000,000 s; got -1."),
        ({"max_ttft": float("nan")}, "max_ttft must be positive, and at most 1,000,000 s; got nan."),
        ({"max_ttft": float("inf")}, "max_ttft must be positive, and at most 1,000,000 s; got inf."),
        ({"max_ttft": "1"}, "max_ttft must be positive, and at most 1,000,000 s; got '1'."),
        ({"max_ttft": True}, "max_ttft must be positive, and at most 1,000,000 s; got True."),
        ({"exact": True}, "With max_ttft, KV may be loaded in part, so that it is not exact: pass exact=False with it."),
        ({"codec": "none"}, NOT_LAYERED.format("none")),
        ({"codec": "int4"}, NOT_LAYERED.format("int4")),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(options: dict[str, Any], message: str) -> None:
    options = {"exact": False, "codec": "lossless", "max_ttft": 1.0, **options}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        CakeCache(bfloat16_llama(), MemoryStore(), **options)
    assert str(caught.value) == message
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        cake_hf.generate(bfloat16_llama(), prompt(), store=MemoryStore(), **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "seconds", [np.float32(LATE), np.float64(LATE), Fraction(LATE)], ids=lambda x: type(x).__name__
)
def test_any_kind_of_number_is_a_time(seconds: Any) -> None:
    with CakeCache(
        bfloat16_llama(), filled(), chunk_size=CHUNK, codec="lossless", exact=False, strategy="load", max_ttft=seconds
    ) as cache:
        assert torch.equal(run(bfloat16_llama(), prompt(), cache).tokens, after_bases_of(range(CHUNKS)).tokens)
        assert cache.report.tokens_hurried == CHUNK * CHUNKS


def test_generate_takes_it() -> None:
    store, reports = filled(), []
    answer = cake_hf.generate(
        bfloat16_llama(), prompt(), store=store, chunk_size=CHUNK, codec="lossless", exact=False, strategy="load",
        max_ttft=LATE, report=reports.append, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(answer, after_bases_of(range(CHUNKS)).tokens)
    assert reports[0].tokens_hurried == CHUNK * CHUNKS
    assert reports[0].tokens == CHUNK * CHUNKS + TAIL
    await_true(lambda: not sharing_of(store).reads())
