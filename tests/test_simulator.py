"""The library's decisions on a virtual clock: laws of every simulated restore, the goals on a grid, and the command.

Nothing here depends on the machine: the same setting gives the same outcome to the last digit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from benchmarks.cells import optimum
from benchmarks.command import bench_app
from benchmarks.simulation import command as command_module
from benchmarks.simulation.command import BEYOND, PAPER, setting_of
from benchmarks.simulation.simulator import MAX_CHUNKS, Cell, Policy, Setting, best_seconds, evaluate, simulate, steps

Command = Callable[..., Result]

POLICIES: tuple[Policy, ...] = ("both", "compute", "load", "cake")
TINY = 1e-9
MEGABYTE = 1e6

NEVER_SLOWER = 1.02
NEAR_PERFECT = 0.95


def setting(chunks: int, base: float, slope: float, load: float, latency: float = 0.0, **rest: Any) -> Setting:
    """Chunks of 1 MB; `load` is the line's seconds for one of them."""
    return Setting(steps(chunks, base, slope), MEGABYTE, MEGABYTE / load, latency, **rest)


seconds = st.floats(1e-3, 10)
any_setting = st.builds(
    setting,
    chunks=st.integers(1, 40),
    base=seconds,
    slope=st.floats(0, 2),
    load=seconds,
    latency=st.floats(0, 5),
    threads=st.integers(1, 4),
    layers=st.integers(1, 40),
    suffix=st.floats(0, 5),
    gpu_share=st.floats(0.1, 1),
    costs_known=st.booleans(),
    most_staged=st.none() | st.integers(0, 50),
    read_timeout=st.sampled_from([float("inf"), 10.0, 0.5]),
)


@settings(max_examples=100)
@given(where=any_setting, policy=st.sampled_from(POLICIES))
def test_every_chunk_is_computed_or_loaded_once(where: Setting, policy: Policy) -> None:
    outcome = simulate(where, policy)
    assert outcome.computed + outcome.loaded == where.chunks
    computed = [span.chunk for span in outcome.spans if span.outcome == "computed"]
    loaded = [span.chunk for span in outcome.spans if span.outcome == "loaded"]
    assert computed == list(range(outcome.computed)) or where.read_timeout < float("inf")
    assert sorted({*computed, *loaded}) == list(range(where.chunks))
    assert len(computed) == len(set(computed))
    assert sum(span.outcome == "preempted" for span in outcome.spans) == outcome.left
    assert all(0 <= span.start <= span.end <= outcome.seconds + TINY for span in outcome.spans)


def min_over_splits(where: Setting) -> float:
    """The least time if the last piece needs to wait for what is computed only."""
    fronts = [sum(where.step_seconds[:m]) for m in range(where.chunks + 1)]
    finish = where.line.finish
    return min(max(front + where.suffix_seconds, finish(where.chunks - m)) for m, front in enumerate(fronts))


@settings(max_examples=100)
@given(where=any_setting)
def test_nothing_is_faster_than_the_best_split(where: Setting) -> None:
    best = best_seconds(where)
    for policy in POLICIES:
        known = where.costs_known and policy in ("both", "load")
        # Where costs are known, the last piece may run beside the last loads.
        limit = min_over_splits(where) if known else best
        assert simulate(where, policy).seconds >= limit * (1 - TINY)


@settings(max_examples=100)
@given(where=any_setting)
def test_the_single_methods_take_what_their_formulas_say(where: Setting) -> None:
    compute = simulate(where, "compute")
    assert compute.seconds == pytest.approx((sum(where.compute) + where.suffix) / where.gpu_share)
    assert (compute.computed, compute.loaded) == (where.chunks, 0)
    load = simulate(replace(where, read_timeout=float("inf"), costs_known=False), "load")
    assert load.seconds == pytest.approx(where.line.finish(where.chunks) + where.suffix / where.gpu_share)
    assert (load.computed, load.loaded) == (0, where.chunks)


@settings(max_examples=100)
@given(where=any_setting)
def test_the_papers_policy_takes_what_a_loop_without_a_ledger_says(where: Setting) -> None:
    """Chunk i arrives as the (n - i)-th; the first that is there when it is asked for ends the walk."""
    now = 0.0
    for index, step in enumerate(where.step_seconds):
        arrival = where.line.finish(where.chunks - index)
        assume(abs(arrival - now) > TINY * now)  # rounding must not decide
        if arrival < now:
            break
        now += step
    assert simulate(where, "cake").seconds == pytest.approx(now + where.suffix_seconds)


@settings(max_examples=30)
@given(where=any_setting)
def test_the_same_setting_gives_the_same_outcome(where: Setting) -> None:
    first = evaluate(where)
    evaluate(setting(1, 1, 0, 1))  # what was learnt of the last setting is kept
    assert evaluate(where) == first


def test_the_limit_is_the_planners_where_there_is_no_latency() -> None:
    where = setting(32, 0.04, 0.001, 0.06, suffix=0.1)
    assert best_seconds(where) == pytest.approx(optimum(where.compute, 0.06, 0.1))


def test_a_restore_by_hand() -> None:
    """Four chunks of 2 s to compute, of 1 s to load, by one thread, of two layers. Chunks 3, 2 and 1 are there after 3 s.

    With known costs, chunk 1 is not begun at 2 s: it will be loaded sooner. The first prompt does begin it, and leaves it.
    """
    where = setting(4, 2, 0, 1, threads=1, layers=2)
    known = simulate(where, "both")
    assert (known.seconds, known.computed, known.left) == (3, 1, 0)
    first = simulate(replace(where, costs_known=False), "both")
    assert (first.seconds, first.computed, first.left) == (3, 1, 1)
    assert [(s.chunk, s.start, s.end) for s in first.spans if s.actor == "compute"] == [(0, 0, 2), (1, 2, 3)]
    assert simulate(where, "cake").seconds == 4
    whole = replace(where, costs_known=False, layers=1, most_staged=4)  # a forward that cannot be preempted
    assert simulate(whole, "both").seconds == 4
    assert simulate(replace(whole, most_staged=1), "both").seconds == 3  # no room: in place, so it is waited for


def test_a_forward_is_left_only_between_layers() -> None:
    """Chunk 1 arrives at 3.5 s, in a forward from 3 to 6 s; layers end at 4, 5 and 6 s."""
    where = setting(2, 3, 0, 3.5, threads=1, layers=3, costs_known=False)
    outcome = simulate(where, "both")
    assert (outcome.seconds, outcome.left) == (4, 1)


def test_a_hole_behind_a_load_runs_through_a_layer_when_that_layer_is_there() -> None:
    """Chunk 1 is not stored. Layers of chunk 0 arrive at 1.1 and 2.2 s; a layer of chunk 1 takes 1 s.

    Computing both takes 4 s. Chunk 0 alone would be computed at 2 s, before its load; but the load's time is mostly hidden.
    """
    where = setting(2, 2, 0, 2.2, threads=1, layers=2, holes=(1,))
    assert simulate(where, "compute").seconds == 4
    assert simulate(where, "load").seconds == pytest.approx(3.2)
    both = simulate(where, "both")
    assert both.seconds == pytest.approx(3.2)
    assert (both.computed, both.loaded) == (1, 1)
    slower = replace(where, bandwidth=where.bandwidth / 2)
    assert simulate(slower, "load").seconds == pytest.approx(5.4)
    assert simulate(slower, "both").seconds == 4


def test_threads_share_the_line_and_overlap_the_latency() -> None:
    where = setting(4, 1, 0, 1, latency=1, threads=2)
    assert simulate(where, "load").seconds == 5
    assert simulate(replace(where, threads=1), "load").seconds == 8


def test_a_share_of_the_device_slows_computing_only() -> None:
    plain = setting(8, 1, 0, 1, suffix=1, costs_known=False)
    whole, half = evaluate(plain), evaluate(replace(plain, gpu_share=0.5))
    assert half.compute == 2 * whole.compute
    assert half.load == whole.load + 1


def grid(threads: tuple[int, ...], latencies: tuple[float, ...], **rest: float | None) -> Iterator[Setting]:
    """Tl/Tc from 1/100 to 100, costs from flat to steep; latencies in chunks' times on the line. All may be staged."""
    ratios = (0.01, 0.1, 0.3, 0.55, 0.8, 1.0, 1.3, 1.9, 4.0, 10.0, 100.0)
    for chunks, ratio, slope in product((1, 2, 4, 8, 32), ratios, (0.0, 0.02, 1.0)):
        costs = steps(chunks, 0.05, 0.05 * slope)
        load = ratio * sum(costs) / chunks
        for count, latency, layers in product(threads, latencies, (1, 32)):
            where = {"threads": count, "layers": layers, "suffix": 0.01, "most_staged": chunks, **rest}
            yield setting(chunks, 0.05, 0.05 * slope, load, latency * load, **where)


@cache
def cell_of(where: Setting) -> Cell:
    """As `evaluate`, without the paper's policy, and with the formula of computing alone; the formula is shown above."""
    both = simulate(where, "both")
    compute = (sum(where.compute) + where.suffix) / where.gpu_share
    load = simulate(where, "load").seconds
    return Cell(both.seconds, compute, load, math.nan, best_seconds(where), both)


def too_slow(cells: Iterator[Setting]) -> list[tuple[float, Setting]]:
    return [(ratio, where) for where in cells if (ratio := cell_of(where).ratio) > NEVER_SLOWER]


def wasteful(cells: Iterator[Setting]) -> list[tuple[float, Setting]]:
    """Both sides are worth using, there are enough chunks, and yet the best split is missed by far."""
    worth_both = (
        (cell.eta, where)
        for where in cells
        if where.chunks >= 8 and 0.5 <= (cell := cell_of(where)).load / cell.compute <= 2
    )
    return [(eta, where) for eta, where in worth_both if eta < NEAR_PERFECT]


def test_never_slower_than_the_better_single_method_with_known_costs() -> None:
    assert too_slow(grid((1, 2, 4), (0.0, 0.3, 3.0))) == []


def test_near_perfect_with_known_costs() -> None:
    assert wasteful(grid((1, 2, 4), (0.0, 0.3, 3.0))) == []


def test_never_slower_with_as_many_staged_chunks_as_a_restore_takes() -> None:
    assert too_slow(grid((1, 2, 4), (0.0, 0.3, 3.0), most_staged=None)) == []
    assert wasteful(grid((1, 2, 4), (0.0, 0.3, 3.0), most_staged=None)) == []


def test_never_slower_where_the_last_piece_is_as_long_as_a_chunk() -> None:
    assert too_slow(grid((1, 2, 4), (0.0, 0.3), most_staged=None, suffix=0.05)) == []


def test_without_staging_it_would_be_slower() -> None:
    """Negative control, and the reason for staging: the main thread would wait for chunks that are loaded in place."""
    assert too_slow(grid((4,), (0.0,), most_staged=0))


def test_the_last_piece_hides_behind_the_last_loads() -> None:
    """Loading is all there is to do: 8 loads of 1 s, two at a time, and a last piece of 1 s that needs not wait for them."""
    where = setting(8, 100, 0, 1, threads=2, layers=16, suffix=1.0)
    assert simulate(replace(where, costs_known=False), "load").seconds == 9
    for strategy in ("load", "both"):
        assert simulate(where, strategy).seconds == pytest.approx(8 + 1 / 16)  # type: ignore[arg-type]
    assert simulate(replace(where, layers=1), "load").seconds == 9


def test_the_first_prompt_ever_is_at_most_one_layer_from_the_best_split() -> None:
    """No costs are known, so a step may be begun that ends after the loads: it is left at the next layer.

    Let i be the chunk it is left in, F(i) when it was begun, L(i) when its load ends. Then `T = min(F(i + 1), L(i) + layer)`
    and `T* >= min(F(i + 1), L(i))`.
    """
    for where in grid((1, 2, 4), (0.0, 0.3, 3.0), costs_known=False):
        layer = max(where.step_seconds) / where.layers
        assert simulate(where, "both").seconds <= best_seconds(where) + layer + TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute": ()}, "number of chunks must be between 1 and"),
        ({"compute": (0.0,)}, "seconds to compute a chunk must be between"),
        ({"compute": (float("nan"),)}, "seconds to compute a chunk must be"),
        ({"compute": (float("inf"),)}, "seconds to compute a chunk must be"),
        ({"chunk_bytes": 0}, "size of a chunk must be"),
        ({"bandwidth": 0}, "bandwidth must be"),
        ({"bandwidth": float("nan")}, "bandwidth must be"),
        ({"latency": -1}, "load latency must be"),
        ({"threads": 0}, "number of loader threads must be"),
        ({"layers": 0}, "number of layers must be"),
        ({"suffix": -1}, "suffix's seconds must be"),
        ({"gpu_share": 0}, "part of the device must be"),
        ({"gpu_share": 1.1}, "part of the device must be"),
        ({"most_staged": -1}, "number of staged chunks must be"),
        ({"read_timeout": 0}, "deadline of a read must be"),
    ],
)
def test_out_of_range_values_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(setting(2, 1, 0, 1), **change)  # type: ignore[arg-type]


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(ValueError, match="strategy must be both, compute, load, cake or fixed, got 'half'"):
        simulate(setting(2, 1, 0, 1), "half")  # type: ignore[arg-type]


@pytest.mark.parametrize("chunks", [0, -1, MAX_CHUNKS + 1])
def test_so_many_steps_are_refused(chunks: int) -> None:
    with pytest.raises(ValueError, match="number of chunks"):
        steps(chunks, 1)


@pytest.mark.parametrize("case", PAPER, ids=lambda case: case.name)
def test_the_papers_policy_is_near_what_the_paper_reports(case: command_module.Case) -> None:
    """Within a fifth, from step times of one model only. Its losing cells are wins or draws of ours, with enough aside."""
    where = setting_of(case, 2)
    cell = evaluate(replace(where, most_staged=where.chunks))
    assert case.published is not None
    simulated = (cell.load / cell.cake, cell.compute / cell.cake)
    for published, ratio in zip(case.published, simulated, strict=True):
        assert published is None or ratio == pytest.approx(published, rel=0.2)
    assert cell.both <= cell.cake * (1 + TINY)
    assert cell.ratio <= 1.001


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `python -m benchmarks simulate` with these arguments."""
    monkeypatch.setenv("COLUMNS", "110")
    return lambda *arguments: CliRunner().invoke(bench_app, ["simulate", *(str(argument) for argument in arguments)])


def test_the_tables(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "BEYOND", BEYOND[:1])
    result = command("--json")
    assert result.exit_code == 0, result.output
    assert "2xA100 where the paper's table names no GPU" in " ".join(result.stdout.split())
    assert "2.63\\1.59" in result.stdout
    plain = json.loads(result.stdout.splitlines()[-1])
    assert [row["cell"] for row in plain["paper"]] == [case.name for case in PAPER]
    assert [row["cell"] for row in plain["beyond"]] == ["70B 8xH100 128K 7G"]
    first = plain["paper"][0]
    assert (first["published_over_load"], first["published_over_compute"]) == (2.63, 1.59)
    assert first["chunks_computed"] + first["chunks_loaded"] == 32
    assert first["eta"] == pytest.approx(first["best"] / first["both"])
    assert command("--paper", "--json").stdout == result.stdout


def test_a_setting_of_ones_own(command: Command) -> None:
    arguments = ("--tokens", 4096, "--chunk", 256, "--kv-kib-per-token", 128, "--base-ms", 20, "--slope-ms", 1)
    result = command(*arguments, "--bandwidth-gbps", 8, "--layers", 16, "--gpu-share", 0.5, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout.splitlines()[-1])
    [row] = plain["own"]
    assert plain["threads"] == 1
    assert row["compute"] == pytest.approx((16 * 0.02 + 120 * 0.001) / 0.5)
    assert row["load"] == pytest.approx(4096 * 128 * 1024 / 1e9)
    assert "Assumed" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--paper", "--tokens", 512), "--paper has settings of its own; leave out --tokens."),
        (("--tokens", 511), "at least one chunk, got 511 tokens in chunks of 512"),
        (("--chunk", 0), "at least one chunk"),
        (("--tokens", 10**12), "number of chunks must be"),
        (("--base-ms", -1), "compute base must be"),
        (("--base-ms", 0, "--slope-ms", 0), "seconds to compute a chunk must be"),
        (("--slope-ms", "nan"), "compute slope must be"),
        (("--bandwidth-gbps", 0), "bandwidth must be"),
        (("--kv-kib-per-token", 0), "size of a chunk must be"),
        (("--layers", 0), "number of layers must be"),
        (("--gpu-share", 0), "part of the device must be"),
        (("--gpu-share", 2), "part of the device must be"),
        (("--tokens", 1024, "--threads", 0), "number of loader threads must be"),
    ],
)
def test_refused_options_are_one_sentence(command: Command, arguments: tuple[object, ...], message: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
