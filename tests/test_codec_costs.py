"""What encoded and raw chunks teach: bandwidth from the bytes that came, and decoding by itself; what `auto` makes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cake_hf import CakeCache, LocalStore, MemoryStore
from cake_hf.chunks.codec import stored_bytes
from cake_hf.chunks.encoded_header import is_encoded
from cake_hf.chunks.stored_forms import EncodedPieces
from cake_hf.report import Span
from cake_hf.scheduling.costs import MAX_BYTES, TYPICAL, Brought, CodecCost, Costs, LoadCost, encoding_pays, finest
from cake_hf.scheduling.layer_gate import ranges_of
from cake_hf.scheduling.learning import CostLearner
from cake_hf.scheduling.pace import Pace
from models import CHUNK, CHUNKS, difference, oracle, prompt, run, shared_model
from test_lossless_cache import values_of

NOW = 1.7e9
RAW = 10**6
RATIO = 0.7
FORMS = {"encoded": (True,), "raw": (False,), "mixed": (True, False), "mostly raw": (True, False, False, False)}


def encoded_bytes(is_encoded: bool) -> int:
    return round(RATIO * RAW) if is_encoded else RAW


def loads(
    forms: Sequence[bool], threads: int, latency: float, speed: float
) -> tuple[list[tuple[float, float]], list[Brought]]:
    """Loads over a path of one raw chunk per second; a thread decodes a chunk's `RAW` bytes in `1 / speed` seconds."""
    free, path, spans, brought = [0.0] * threads, 0.0, [], []
    for form in forms:
        thread = free.index(min(free))
        begin, decoding = free[thread], form / speed
        path = max(path, begin) + encoded_bytes(form) / RAW
        free[thread] = path + latency + decoding
        spans.append((begin, free[thread]))
        brought.append(Brought(encoded_bytes(form), RAW, decoding))
    return spans, brought


def taught(forms: Sequence[bool], threads: int, latency: float, speed: float) -> CostLearner:
    """A learner that has seen two prompts of 16 loads; the first one is cold."""
    learner = CostLearner()
    for _ in range(2):
        learner.saw_loads(RAW, *loads([forms[n % len(forms)] for n in range(16)], threads, latency, speed))
    return learner


def raw_seconds(threads: int, latency: float) -> float:
    return LoadCost(latency, RAW, RAW, threads).interval


def encoded_seconds(threads: int, latency: float, speed: float) -> float:
    return LoadCost(latency, RAW, RATIO * RAW, threads, 1 / speed).interval


@pytest.mark.fault(
    "Time and bounds",
    "Raw and encoded chunks mix in one store.",
    "Bandwidth is learnt from the bytes that came and decoding by itself; what raw chunks cost is known from encoded ones.",
)
@pytest.mark.parametrize("speed", [20.0, 1.0, 0.3])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("name", FORMS)
def test_each_form_tells_what_the_other_costs(name: str, threads: int, speed: float) -> None:
    costs = taught(FORMS[name], threads, 0.0, speed)
    raw = costs.costs(RAW).load
    assert raw is not None
    if speed * threads >= 1:  # or else decoding hides how fast the path is
        assert raw.interval == pytest.approx(raw_seconds(threads, 0.0), rel=0.1)
    else:
        assert raw.interval <= 1.6 * raw_seconds(threads, 0.0)
    codec = costs.costs().codec
    if name == "raw":
        assert codec is None
        return
    assert codec is not None
    assert (codec.ratio, codec.speed) == pytest.approx((RATIO, speed * RAW))
    assert codec.load(raw).interval == pytest.approx(encoded_seconds(threads, 0.0, speed), rel=0.1)


@pytest.mark.parametrize("latency", [0.3, 2.0])
@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("name", FORMS)
def test_latency_stays_apart(name: str, threads: int, latency: float) -> None:
    raw = taught(FORMS[name], threads, latency, 2.0).costs(RAW).load
    assert raw is not None
    assert raw.interval == pytest.approx(raw_seconds(threads, latency), rel=0.35)


@given(st.floats(0, 1), st.floats(0.01, 1), st.floats(0.0, 2), st.integers(1, 4), st.integers(1, 40))
def test_what_was_seen_is_predicted(latency: float, transfer: float, decoding: float, threads: int, count: int) -> None:
    """Of encoded chunks alone, all that was measured can be told again."""
    truth, learner = LoadCost(latency, RAW / transfer, RAW, threads, decoding), CostLearner()
    free, path, spans = [0.0] * threads, 0.0, []
    for _ in range(count):
        thread = free.index(min(free))
        begin = free[thread]
        path = max(path, begin) + transfer
        free[thread] = path + latency + decoding
        spans.append((begin, free[thread]))
    learner.saw_loads(2 * RAW, spans, [Brought(RAW, 2 * RAW, decoding)] * count)
    found = learner.costs().load
    assert found is not None
    assert (found.chunk_bytes, found.decoding) == (RAW, pytest.approx(decoding))
    assert found.finish(count) == pytest.approx(truth.finish(count), rel=1e-6)
    assert found.seconds == pytest.approx(truth.seconds, rel=1e-6)


def test_a_store_that_turns_from_one_form_to_the_other_is_not_doubtful() -> None:
    """Decoding takes five times as long as the path, but the path is as fast as ever."""
    learner = CostLearner()
    for form in (True, False, True, False, False):
        learner.saw_loads(RAW, *loads([form] * 9, 1, 0.0, 0.2))
    assert learner.spread() == pytest.approx(1.0, rel=1e-3)


def test_a_restore_teaches_by_chunk() -> None:
    """Without an entry, a chunk was raw; loads that were superseded count if there are no others."""
    timeline = [Span("load-0", index, 2.0 * index, 2.0 * index + 2, "loaded") for index in range(4)]
    brought = {index: Brought(RAW, 2 * RAW, 1.0) for index in range(4)}
    learner = CostLearner()
    learner.saw_restore(Pace(Costs()), timeline, 2 * RAW, brought)
    assert learner.costs().load == LoadCost(0.0, RAW, RAW, 1, 1.0)
    assert learner.costs(2 * RAW).load == LoadCost(0.0, RAW, 2 * RAW)
    assert learner.costs().codec == CodecCost(0.5, 2 * RAW)
    learner = CostLearner()
    learner.saw_restore(Pace(Costs()), timeline, 2 * RAW, {})
    assert learner.costs().load == LoadCost(0.0, RAW, 2 * RAW)
    assert learner.costs().codec is None


def test_decoding_is_remembered_while_raw_chunks_come() -> None:
    learner = taught((True,), 1, 0.0, 2.0)
    for _ in range(20):
        learner.saw_loads(RAW, *loads([False] * 4, 1, 0.0, 1.0))
    costs = learner.costs()
    assert costs.codec == CodecCost(RATIO, 2.0 * RAW)
    assert costs.load == LoadCost(0.0, RAW, RAW)


@pytest.mark.parametrize(("name", "ranges"), [("encoded", 1), ("raw", 8), ("mostly raw", 8)])
def test_nothing_is_hidden_behind_chunks_that_come_whole(name: str, ranges: int) -> None:
    assert ranges_of(taught(FORMS[name], 2, 0.0, 20.0).costs(), 8, 1e-6) == ranges


def test_one_thread_that_was_not_let_run_says_nothing_of_decoding() -> None:
    spans, brought = loads([True] * 8, 2, 0.0, 4.0)
    brought[3] = brought[3]._replace(decoding=9.0)
    spans[3] = (spans[3][0], spans[3][1] + 9.0)
    learner = CostLearner()
    learner.saw_loads(RAW, spans, brought)
    assert learner.costs().codec == CodecCost(RATIO, 4.0 * RAW)


# At rest.


def again(text: str) -> CostLearner:
    found = CostLearner.from_json(text, NOW)
    assert found is not None
    return found


@pytest.mark.parametrize("name", FORMS)
def test_notes_keep_it(name: str) -> None:
    learner = taught(FORMS[name], 2, 0.2, 1.5)
    assert again(learner.to_json(NOW)).costs() == learner.costs()


def test_notes_from_before_the_codec_stay_readable() -> None:
    old = {
        "format": "cake_hf costs",
        "version": 3,
        "written": NOW,
        "spread": 1.0,
        "credit": 0.5,
        "quiet": 1.0,
        "steps": [[[0, 2.0], [1, 2.5]]],
        "loads": [[RAW, 4, 4.0, 1.0, 1]],
        "cold_step": None,
        "cold_load": [RAW, 1, 9.0, 9.0, 1],
    }
    costs = again(json.dumps(old)).costs()
    assert costs.load == LoadCost(0.0, RAW, RAW)
    assert costs.codec is None
    assert costs.compute is not None
    assert costs.compute.seconds(1) == pytest.approx(2.5)
    assert again(again(json.dumps(old)).to_json(NOW)).costs() == costs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codecs", {}),
        ("codecs", [[0.7]]),
        ("codecs", [[0.0, 1e9]]),
        ("codecs", [[float("nan"), 1e9]]),
        ("codecs", [[0.7, 0.5]]),
        ("codecs", [[0.7, 2.0 * MAX_BYTES]]),
        ("codecs", [["0.7", 1e9]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, RAW, -0.1, 1.0]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, RAW, 3.5, 1.0]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, 0, 0.0, 1.0]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, 0.5, 0.0, 1.0]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, RAW, float("nan"), 1.0]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, RAW, 0.0, 0.5]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, RAW, 0.0, 4.5]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, RAW]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, RAW, 0.0, 1.0, -1e-9]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, RAW, 0.0, 1.0, float("nan")]]),
        ("loads", [[RAW, 4, 4.0, 1.0, 1, RAW, 0.0, 1.0, 0.0, 0.0]]),
    ],
)
def test_absurd_values_in_a_note_are_ignored(name: str, value: Any) -> None:
    plain = json.loads(taught((True,), 2, 0.0, 1.0).to_json(NOW))
    assert CostLearner.from_json(json.dumps({**plain, name: value}), NOW) is None


any_size = st.integers(-5, 2**60)
any_seconds = st.floats()


@settings(max_examples=100)
@given(st.lists(st.tuples(any_seconds, any_seconds, any_size, any_size, any_seconds, any_seconds), max_size=6))
def test_no_measurement_makes_a_senseless_cost(rows: list[tuple[float, float, int, int, float, float]]) -> None:
    learner = CostLearner()
    brought = [
        Brought(nbytes, raw_bytes, decoding, working=working) for _, _, nbytes, raw_bytes, decoding, working in rows
    ]
    for (start, end, *_), one in zip(rows, brought, strict=True):
        learner.saw_loads(RAW, [(start, end)], [one])
    learner.saw_loads(RAW, [row[:2] for row in rows], brought)
    costs = learner.costs()
    if costs.load is not None:
        assert 0 <= costs.load.finish(1000) < float("inf")
    assert again(learner.to_json(NOW)).costs() == costs


# Which form pays, and which one is in time.

a_load = st.builds(LoadCost, st.floats(0, 5), st.floats(1e3, 1e12), st.floats(1e3, 1e9), st.integers(1, 8))
a_codec = st.builds(CodecCost, st.floats(0.05, 0.99), st.floats(1e3, 1e12))


@given(a_load, a_codec)
def test_encoding_pays_only_where_chunks_come_no_slower(raw: LoadCost, codec: CodecCost) -> None:
    pays = encoding_pays(Costs(None, raw, codec))
    assert pays == (codec.load(raw).interval <= raw.interval)
    if raw.threads * codec.speed < raw.bandwidth * (1 - 1e-9):
        assert not pays


@given(a_load, a_codec, st.floats(1e-12, 1e-6))
def test_where_loads_wait_for_nothing_encoding_pays_if_it_is_less_work(
    raw: LoadCost, codec: CodecCost, copying: float
) -> None:
    work = codec.ratio * copying + 1 / codec.speed
    assert encoding_pays(Costs(None, replace(raw, copying=copying), codec)) == (work <= 0.9 * copying)


@pytest.mark.parametrize("form", [True, False], ids=["encoded", "raw"])
@pytest.mark.parametrize(("working", "of"), [(1, 1), (1, 3), (1, 5), (0, 1)])
def test_work_is_told_from_waiting(form: bool, working: int, of: int) -> None:
    """Loads of which each `of`-th has a processor all the time; the threads of the others wait, be it for a processor."""
    spans, brought = loads([form] * 30, 2, 0.0, 4.0)
    brought = [
        one._replace(working=(end - start if index % of < working else one.decoding))
        for index, ((start, end), one) in enumerate(zip(spans, brought, strict=True))
    ]
    learner = CostLearner()
    learner.saw_loads(RAW, spans, brought)
    load = learner.costs(RAW).load
    assert load is not None
    waits_for_nothing = bool(working) and of < 4
    assert load.copying == pytest.approx((2.0 / RAW if waits_for_nothing else 0.0), rel=0.3)
    assert again(learner.to_json(NOW)).costs(RAW) == learner.costs(RAW)


@given(a_load, a_codec)
def test_where_nothing_is_known_encoding_pays(raw: LoadCost, codec: CodecCost) -> None:
    assert encoding_pays(Costs())
    assert encoding_pays(Costs(None, raw, None))
    assert encoding_pays(Costs(None, None, codec))


@given(
    st.lists(st.tuples(st.floats(0.05, 1), st.floats(1e6, 1e10)), min_size=1, max_size=5),
    a_load,
    st.integers(0, 500),
    st.floats(-10, 1e6),
)
def test_the_finest_form_that_is_in_time(
    codecs: list[tuple[float, float]], raw: LoadCost, left: int, seconds: float
) -> None:
    forms = [raw, *(CodecCost(ratio, speed).load(raw) for ratio, speed in codecs)]
    chosen = finest(forms, left, seconds)
    fits = [left * form.interval <= seconds for form in forms]
    assert chosen == (fits.index(True) if any(fits) else None)
    if chosen is None:
        return
    # More time, fewer chunks and a faster path never make it coarser.
    for more in (finest(forms, left, 2 * abs(seconds)), finest(forms, left // 2, seconds)):
        assert more is not None
        assert more <= chosen
    faster = [LoadCost(one.latency, 2 * one.bandwidth, one.chunk_bytes, one.threads, one.decoding) for one in forms]
    sooner = finest(faster, left, seconds)
    assert sooner is not None
    assert sooner <= chosen


@pytest.mark.parametrize("name", sorted(TYPICAL))
def test_typical_figures_take_fewer_bytes(name: str) -> None:
    assert TYPICAL[name].ratio < 1


# In a cache.


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return shared_model("llama", "bfloat16")


def learn(
    model: torch.nn.Module, store: Any, *, bandwidth: float, speed: float, threads: int = 2, work: float = 0.0
) -> None:
    """Teaches a store's costs what was measured elsewhere; `work` is the share of loads for which their threads worked."""
    with CakeCache(model, store, chunk_size=CHUNK, save=False) as cache:
        memory = cache._session.cost_memory(cache._session.bound_model.namespace())
        raw = stored_bytes(cache._session.bound_model.layout())
    for _ in range(2):
        for codec in (CodecCost(1.0, float(MAX_BYTES)), CodecCost(RATIO, speed)):
            load = codec.load(LoadCost(0.0, bandwidth, raw, threads))
            brought = Brought(round(load.chunk_bytes), raw, load.decoding if codec.ratio < 1 else 0.0)
            spans, free, path = [], [0.0] * threads, 0.0
            for index in range(16):
                thread = free.index(min(free))
                begin = free[thread]
                path = max(path, begin) + brought.nbytes / bandwidth
                free[thread] = path + brought.decoding
                brought = brought._replace(working=work * (free[thread] - begin))
                spans.append(Span(f"load-{thread}", index, begin, free[thread], "loaded"))
            memory.learn(Pace(Costs()), spans, raw, None, dict.fromkeys(range(16), brought))


def saved_forms(model: torch.nn.Module, store: Any, codec: str) -> set[bool]:
    with CakeCache(model, store, chunk_size=CHUNK, codec=codec, strategy="compute") as cache:
        cache.prefill(prompt())
        assert cache.flush(60)
    return set(map(is_encoded, values_of(store).values()))


@pytest.mark.parametrize(
    ("bandwidth", "speed", "encodes"),
    [(1e9, 5e9, True), (100e9, 5e9, False), (1e9, 0.2e9, False), (5e9, 5e9, True), (11e9, 5e9, False)],
)
def test_auto_goes_by_what_was_learnt(
    model: torch.nn.Module, tmp_path: Path, bandwidth: float, speed: float, encodes: bool
) -> None:
    store = LocalStore(tmp_path)
    learn(model, store, bandwidth=bandwidth, speed=speed)
    assert saved_forms(model, store, "auto") == {encodes}


@pytest.mark.parametrize(("work", "encodes"), [(1.0, False), (0.5, True), (0.0, True)])
def test_auto_does_not_encode_what_comes_from_the_page_cache(
    model: torch.nn.Module, tmp_path: Path, work: float, encodes: bool
) -> None:
    """The same times, in which threads have worked or waited: for a disk, fewer bytes are worth the decoding."""
    store = LocalStore(tmp_path)
    learn(model, store, bandwidth=5e9, speed=5e9, work=work)
    assert saved_forms(model, store, "auto") == {encodes}


@pytest.mark.parametrize(("works", "copying"), [(True, True), (False, False)])
def test_a_restore_tells_work_from_waiting(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool, copying: bool
) -> None:
    """With a clock of the thread that runs faster than any other, or never."""
    store = LocalStore(tmp_path)
    saved_forms(model, store, "none")
    monkeypatch.setattr(time, "thread_time", lambda: 1e3 * time.monotonic() if works else 0.0)
    for _ in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load", save=False) as cache:
            run(model, prompt(), cache)
            load = cache._session.cost_memory(cache._session.bound_model.namespace()).costs().load
    assert load is not None
    assert (load.copying > 0) is copying


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_a_codec_by_name_is_not_overruled(model: torch.nn.Module, tmp_path: Path, codec: str) -> None:
    store = LocalStore(tmp_path)
    learn(model, store, bandwidth=100e9 if codec == "lossless" else 1e6, speed=5e9)
    assert saved_forms(model, store, codec) == {codec == "lossless"}


def test_the_form_changes_no_key_and_no_bit(model: torch.nn.Module, tmp_path: Path) -> None:
    """Half of the chunks encoded, half raw, since what is believed changed in between."""
    store, keys = LocalStore(tmp_path), []
    for bandwidth, tokens in ((1e9, CHUNKS // 2 * CHUNK + 1), (1e12, None)):
        learn(model, store, bandwidth=bandwidth, speed=5e9)
        with CakeCache(model, store, chunk_size=CHUNK, codec="auto", strategy="load") as cache:
            cache.prefill(prompt()[:, :tokens])
            assert cache.flush(60)
        keys.append(set(store.keys()))
    assert keys[0] < keys[1]
    assert set(map(is_encoded, values_of(store).values())) == {False, True}
    with CakeCache(model, store, chunk_size=CHUNK, codec="auto", strategy="load") as cache:
        outcome = run(model, prompt(), cache)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (CHUNKS, 0)
    assert difference(outcome, oracle(model, prompt())) == ""


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_a_restore_tells_bytes_and_decoding_apart(
    model: torch.nn.Module, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves while decoding only: all of the time is decoding's, none of it the store's."""
    store, now = MemoryStore(), [0.0]
    saved_forms(model, store, codec)
    sizes = sorted(len(value) for value in values_of(store).values())[-CHUNKS:]  # the tail is smaller
    decode = EncodedPieces.decode_into

    def slow(*arguments: Any) -> Any:
        now[0] += 1.0  # all of them together take less than a read may
        return decode(*arguments)

    monkeypatch.setattr(EncodedPieces, "decode_into", slow)
    monkeypatch.setattr(time, "monotonic", lambda real=time.monotonic: real() + now[0])
    for _ in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, codec=codec, strategy="load", save=False) as cache:
            run(model, prompt(), cache)
            assert cache.report.chunks_loaded == CHUNKS
            costs = cache._session.cost_memory(cache._session.bound_model.namespace()).costs()
            raw = stored_bytes(cache._session.bound_model.layout())
    assert costs.load is not None
    assert costs.load.chunk_bytes == pytest.approx(sum(sizes) / len(sizes), rel=0.01)
    if codec == "none":
        assert (costs.load.decoding, costs.codec) == (0.0, None)
        return
    assert costs.codec is not None
    assert costs.codec.ratio == pytest.approx(sum(sizes) / len(sizes) / raw, rel=0.01)
    assert 1.0 <= costs.load.decoding <= 3.0  # two threads may be decoding at once
    assert costs.codec.speed <= raw
