"""Encoded chunks on a virtual clock: what they gain, what decoding takes, and loads that keep a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from benchmarks.command import bench_app
from benchmarks.simulation.codecs import DROPPING_GBPS, FORMS, TARGET, eight, gain
from benchmarks.simulation.simulator import Setting, best_after, evaluate, learnt, simulate, simulate_prompts, steps
from benchmarks.simulation.speeds import step
from cake_hf.scheduling.costs import RAW, CodecCost, Costs, encoding_pays

Command = Callable[..., Result]

MEGABYTE, STEP = 1e6, 0.05
TINY = 1e-9


def setting(chunks: int, load: float, codec: CodecCost | None = None, slope: float = 0.0, **rest: float) -> Setting:
    """Chunks of 1 MB that take `STEP` to compute; loading them raw takes `load` times as long."""
    costs = steps(chunks, STEP, slope * STEP)
    bandwidth = MEGABYTE * chunks / (load * sum(costs))
    return Setting(costs, MEGABYTE, bandwidth, codec=codec, **rest)  # type: ignore[arg-type]


def takes(decoding: float, ratio: float = 0.7) -> CodecCost:
    """A codec that decodes a chunk of 1 MB in so many seconds."""
    return CodecCost(ratio, MEGABYTE / decoding if decoding > TINY else RAW.speed)


loading = st.floats(0.1, 5.0)
ratios = st.floats(0.15, 0.95)


@settings(max_examples=30)
@given(st.integers(8, 48), loading, ratios, st.integers(1, 4))
def test_the_gain_over_raw_is_reached_within_one_chunk(chunks: int, load: float, ratio: float, threads: int) -> None:
    """`r(Tc + Tl) / (Tc + r*Tl)` is of chunks that can be cut anywhere; decoding costs nothing here."""
    raw = simulate(setting(chunks, load, threads=threads), "both").seconds
    where = setting(chunks, load, takes(0.0, ratio), threads=threads)
    encoded = simulate(where, "both").seconds
    bound = chunks * STEP * ratio * load / (1 + ratio * load)
    chunk = max(STEP, where.line.interval)
    assert bound * (1 - 1e-4) <= encoded <= bound + chunk + TINY
    assert encoded <= raw * gain(ratio, load) + chunk + TINY


@settings(max_examples=30)
@given(st.integers(4, 32), loading, ratios, st.integers(1, 4), st.floats(0, 0.2), st.sampled_from([0.0, 0.3]))
def test_never_worse_than_the_better_single_method(
    chunks: int, load: float, ratio: float, threads: int, decoding: float, waits: float
) -> None:
    where = setting(chunks, load, takes(decoding, ratio), 0.02, threads=threads, latency=waits * STEP)
    cell = evaluate(where)
    assert cell.ratio <= 1.02
    assert cell.load == pytest.approx(where.line.finish(chunks), rel=1e-4)  # files have whole bytes


def test_nor_on_shared_cores_where_decoding_is_a_fiftieth_of_computing() -> None:
    for chunks, load, threads, cores in product((8, 32), (0.1, 0.55, 1.0, 1.9, 4.0), (1, 2, 4), (1, 2, 8)):
        where = setting(chunks, load, takes(0.02 * STEP), 0.02, threads=threads, cores=cores)
        assert evaluate(where).ratio <= 1.02, where


def test_decoding_takes_from_computing_on_the_same_cores() -> None:
    """Ten chunks by one loader, each 1 s to compute, 1 s raw on the line, half of that encoded, 0.5 s to decode on 2 cores."""
    own = Setting(steps(10, 1.0), MEGABYTE, MEGABYTE, threads=1, codec=CodecCost(0.5, 2 * MEGABYTE), layers=1)
    shared = replace(own, cores=2)
    assert simulate(own, "load").seconds == simulate(shared, "load").seconds == 10
    assert simulate(own, "both").seconds == 5
    outcome = simulate(shared, "both")
    first = next(span for span in outcome.spans if span.actor == "compute")
    assert first.end == pytest.approx(1.25)  # while it is computed one chunk is decoded: 0.5 s on one of two cores


def test_threads_decode_at_once() -> None:
    where = Setting(steps(8, 100.0), MEGABYTE, MEGABYTE, threads=1, codec=CodecCost(0.5, MEGABYTE))
    assert simulate(where, "load").seconds == pytest.approx(8 * 1.5)
    assert simulate(replace(where, threads=3), "load").seconds == pytest.approx(8 * 0.5 + 1.0)


def test_prompts_of_either_form_teach_what_the_other_costs() -> None:
    """After a prompt of raw chunks, one of encoded ones, and back: each time the costs of both are right."""
    codec = takes(0.3 * STEP)
    raw = setting(16, 1.0, threads=1)
    encoded = replace(raw, codec=codec)
    learner = learnt(raw)
    for where in (encoded, raw, encoded, encoded, raw):
        simulate_prompts([where], learner)
        costs = learner.costs(round(MEGABYTE))
        assert costs.load is not None
        assert costs.codec is not None
        assert costs.load.interval == pytest.approx(raw.line.interval, rel=1e-3)
        assert costs.codec.load(costs.load).interval == pytest.approx(encoded.line.interval, rel=1e-3)


def test_what_was_still_possible_is_not_told_of_encoded_chunks() -> None:
    where = setting(4, 1.0, takes(0.0))
    with pytest.raises(ValueError, match="raw chunks only"):
        best_after(where, simulate(where, "both"), 0.1)


# Loads that keep a time.

forms = tuple(FORMS.values())


def adapting(where: Setting, seconds: float) -> Setting:
    return replace(where, forms=forms, max_ttft=seconds)


def alone(where: Setting, codec: CodecCost) -> float:
    return simulate(replace(where, codec=None if codec is RAW else codec), "both").seconds


@pytest.mark.parametrize("gbps", [4, 7, 16, 32, 100])
def test_a_time_that_the_coarsest_form_keeps_is_kept_and_no_coarser_than_needed(gbps: float) -> None:
    where = eight(gbps, 2)
    finest, coarsest = alone(where, forms[0]), min(alone(where, form) for form in forms)
    chunk = max(where.compute[-1], where.line.interval)
    before: tuple[int, ...] | None = None
    for share in (0.2, 0.5, 0.8, 1.0, 1.5):
        target = coarsest + share * (finest - coarsest) + 0.2 * (finest <= coarsest)
        outcome = simulate(adapting(where, target), "both")
        assert outcome.seconds <= target + chunk
        lossy = sum(form > 1 for form in outcome.forms)
        if before is not None:
            assert lossy <= sum(form > 1 for form in before) + 1
        before = outcome.forms
    assert before is not None
    assert set(before) == {0}  # time enough for all as it is
    assert simulate(adapting(where, math.inf), "both").seconds == pytest.approx(alone(where, RAW))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("latency", [0.0, 0.02, 0.08])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_it_is_kept_however_loads_arrive(threads: int, latency: float, *, known: bool) -> None:
    """With latency, loads arrive in bunches. Where no costs are known, the first one to arrive tells them."""
    for gbps in (7, 32):
        where = replace(eight(gbps, threads), latency=latency, costs_known=known)
        finest, coarsest = alone(where, forms[0]), min(alone(where, form) for form in forms)
        for share in (0.2, 0.8, 1.5):
            target = coarsest + share * (abs(finest - coarsest) + 0.1)
            outcome = simulate(adapting(where, target), "both")
            assert outcome.seconds <= target + 1.1 * max(where.compute[-1], where.line.interval)
        assert 0 in outcome.forms


def test_where_no_form_is_in_time_the_coarsest_is_loaded() -> None:
    where = replace(eight(DROPPING_GBPS, 2), line_speed=step(0.0, 0.01))
    outcome = simulate(adapting(where, 0.1), "both")
    assert outcome.computed + outcome.loaded == where.chunks
    assert set(outcome.forms[:-2]) <= {len(forms) - 1}  # but for those claimed before the line's speed was known


@pytest.mark.parametrize("left", [0.5, 0.4, 0.7])
def test_a_line_that_drops(left: float) -> None:
    """As it is, and lossless with the lesser drops, the target is missed; with a choice it is kept."""
    where = replace(eight(DROPPING_GBPS, 2), line_speed=step(0.15, left))
    assert left == 0.7 or alone(where, RAW) > TARGET
    outcome = simulate(adapting(where, TARGET), "both")
    assert outcome.seconds <= TARGET + where.compute[-1]
    assert len(outcome.forms) == outcome.loaded


def test_the_figures_of_an_8b_shape() -> None:
    """As the first trial of codecs gave them: 7 Gbps, 16K tokens, 1.40 s to compute all."""
    assert sum(eight(7, 2).compute) == pytest.approx(1.40, abs=0.005)
    found = [round(alone(eight(7, 2), form), 2) for form in forms]
    assert found == [0.84, 0.71, 0.61, 0.47]


# The command.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `python -m benchmarks simulate` with these arguments."""
    monkeypatch.setenv("COLUMNS", "110")
    return lambda *arguments: CliRunner().invoke(bench_app, ["simulate", *(str(argument) for argument in arguments)])


def test_the_tables(command: Command) -> None:
    result = command("--codecs", "--json")
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout.splitlines()[-1])
    assert list(plain) == ["threads", "paper", "bandwidths", "cores", "drops"]
    published = [(row["published_over_load"], row["published_over_compute"]) for row in plain["paper"]]
    assert published == [(2.63, 1.59), (1.85, 2.12), (1.37, 3.73)]
    for row in plain["paper"]:  # within a fifth, as all cells of the paper
        assert row["load"] / row["cake"] == pytest.approx(row["published_over_load"], rel=0.2)
        assert row["compute"] / row["cake"] == pytest.approx(row["published_over_compute"], rel=0.2)
    for row in plain["bandwidths"]:
        raw = eight(row["gbps"], 2).line
        assert (row["auto"] == "lossless") == encoding_pays(Costs(None, raw, FORMS["lossless"]))
        for name, seconds in row["seconds"].items():
            assert seconds >= 0.98 * row["best"][name]  # the last chunk may be left for one that has arrived
    for row in plain["drops"]:
        assert sum(row["shares"].values()) + row["computed"] == pytest.approx(1.0)
        assert row["met"] == (row["seconds"] <= TARGET)


def test_a_setting_of_ones_own(command: Command) -> None:
    plain, encoded, shared = (
        json.loads(command("--bandwidth-gbps", 16, "--json", *more).stdout.splitlines()[-1])["own"][0]
        for more in ((), ("--codec", "near"), ("--codec", "near", "--cores", 1))
    )
    assert encoded["load"] < 0.6 * plain["load"]
    assert encoded["both"] < plain["both"]
    assert encoded["both"] < shared["both"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codec", "zip"), "codec 'zip' is unknown; choose one of none, lossless, near, int4."),
        (("--cores", -1), "number of cores must be between 0 and"),
        (("--codecs", "--tokens", 4096), "--codecs has settings of its own; leave out --tokens."),
        (("--codecs", "--beliefs"), "--codecs has settings of its own; leave out --beliefs."),
    ],
)
def test_refused_options_are_one_sentence(command: Command, arguments: tuple[object, ...], message: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("change", [{"max_ttft": -1.0}, {"max_ttft": math.nan}, {"cores": 10**6}])
def test_out_of_range_values_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be between"):
        setting(2, 1.0, **change)  # type: ignore[arg-type]
