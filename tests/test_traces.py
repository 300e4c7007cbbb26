"""Traces: what a wrong line gets, generated statistics, what is stored when, and laws of the replay on the simulator.

Nothing here depends on the machine's speed: the simulator's clock is virtual.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation.simulator import simulate
from benchmarks.traces import command as command_module
from benchmarks.traces import tables
from benchmarks.traces.generating import KINDS, LONGEST, PUBLISHED, generate
from benchmarks.traces.methods import BOTH, COMPUTE, LOAD, Visit, loads, methods, threshold, visits_of
from benchmarks.traces.queueing import loads_ahead, one_by_one, scaled_arrivals, spread, waits
from benchmarks.traces.reading import BrokenTrace, read_trace
from benchmarks.traces.replaying import Replay, by_class, regret
from benchmarks.traces.requests import BLOCK, Request, statistics_of
from benchmarks.traces.serving import MODELS, Serving
from benchmarks.traces.stored import LeastRecentlyUsed, hits_of
from commands import run_benchmark
from made_traces import trace_of

ROOT = Path(__file__).parent.parent
NEVER_SLOWER = 1.02
TINY = 1e-9

MOONCAKE: dict[str, Any] = {"timestamp": 1500, "input_length": 1100, "output_length": 7, "hash_ids": [4, 5, 9]}
COUNTS: dict[str, Any] = {"time": 2, "prefix": "a", "prefix_tokens": 1024, "new_tokens": 76, "output_tokens": 7}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


# Reading.


def test_mooncakes_rows_are_read(tmp_path: Path) -> None:
    later = {"timestamp": 2500, "input_length": 1024, "output_length": 0, "hash_ids": [4, 5]}
    trace = read_trace(write(tmp_path / "some.jsonl", MOONCAKE, later))
    first, second = trace.requests
    assert (trace.name, trace.block) == ("some", 512)
    assert (first.time, first.tokens, first.output, len(first.blocks)) == (0, 1100, 7, 2)
    # A prompt of two blocks leaves the last one to run: at least one token is never stored.
    assert (second.time, second.blocks) == (1.0, first.blocks[:1])


def test_token_counts_are_read(tmp_path: Path) -> None:
    rows = [
        COUNTS,
        COUNTS | {"time": 3, "new_tokens": 900},
        COUNTS | {"time": 4, "prefix": "b"},
        COUNTS | {"time": 5, "prefix": None, "prefix_tokens": 0, "new_tokens": 1100},
        without(COUNTS, "prefix") | {"time": 6, "prefix_tokens": 0, "new_tokens": 1100},
    ]
    requests = read_trace(write(tmp_path / "counts.jsonl", *rows)).requests
    assert [len(one.blocks) for one in requests] == [2, 3, 2, 2, 2]
    assert requests[1].blocks[:2] == requests[0].blocks
    different = {block for one in requests for block in one.blocks}
    assert len(different) == 2 + 1 + 2 + 2 + 2


def test_a_conversation_appends_to_its_text(tmp_path: Path) -> None:
    grown = COUNTS | {"prefix_tokens": 1100, "new_tokens": 500, "appends": True}
    requests = read_trace(write(tmp_path / "c.jsonl", COUNTS | {"appends": True, "new_tokens": 600}, grown)).requests
    assert requests[1].blocks == requests[0].blocks
    alone = read_trace(write(tmp_path / "d.jsonl", COUNTS | {"new_tokens": 600}, without(grown, "appends"))).requests
    assert alone[1].blocks[:2] == alone[0].blocks[:2]
    assert alone[1].blocks[2] != alone[0].blocks[2]


def test_equal_numbers_behind_other_ones_are_other_blocks(tmp_path: Path) -> None:
    other = MOONCAKE | {"hash_ids": [8, 5, 9]}
    first, second = read_trace(write(tmp_path / "t.jsonl", MOONCAKE, other)).requests
    assert set(first.blocks).isdisjoint(second.blocks)


def test_requests_are_sorted_by_time_and_empty_lines_ignored(tmp_path: Path) -> None:
    rows = [MOONCAKE, "", MOONCAKE | {"timestamp": 500, "output_length": 1}]
    assert [(one.time, one.output) for one in read_trace(write(tmp_path / "t.jsonl", *rows)).requests] == [
        (0.0, 1),
        (1.0, 7),
    ]


@pytest.mark.parametrize("name", ["timestamp", "input_length", "output_length", "hash_ids"])
def test_a_field_of_mooncakes_that_is_missing_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "t.jsonl", MOONCAKE, "", without(MOONCAKE, name))
    with pytest.raises(BrokenTrace, match=rf"^t\.jsonl, line 3: there is no '{name}'\.$"):
        read_trace(path)


@pytest.mark.parametrize("name", ["time", "prefix", "prefix_tokens", "new_tokens", "output_tokens"])
def test_a_field_of_token_counts_that_is_missing_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "t.jsonl", COUNTS, without(COUNTS, name))
    with pytest.raises(BrokenTrace, match=rf"^t\.jsonl, line 2: there is no '{name}'\.$"):
        read_trace(path)


WRONG = [
    ({"input_length": "1100"}, "'input_length' must be a whole number"),
    ({"input_length": 0}, "'input_length' must be a whole number from 1"),
    ({"input_length": 1100.5}, "'input_length' must be a whole number"),
    ({"input_length": True}, "'input_length' must be a whole number"),
    ({"input_length": 10**400}, "'input_length' must be a whole number"),
    ({"input_length": 5000}, "5000 tokens have 10 blocks of 512, but 'hash_ids' has 3"),
    ({"output_length": -1}, "'output_length' must be a whole number from 0"),
    ({"output_length": None}, "'output_length' must be a whole number"),
    ({"hash_ids": 4}, "'hash_ids' must be a list of whole numbers"),
    ({"hash_ids": [4, "5", 9]}, "'hash_ids' must be a list of whole numbers"),
    ({"hash_ids": [4, True, 9]}, "'hash_ids' must be a list of whole numbers"),
    ({"timestamp": -1}, "'timestamp' must be a time"),
    ({"timestamp": float("nan")}, "'timestamp' must be a time"),
    ({"timestamp": float("inf")}, "'timestamp' must be a time"),
    ({"timestamp": "now"}, "'timestamp' must be a time"),
]
WRONG_COUNTS = [
    ({"prefix": [1]}, "'prefix' must be a text or a whole number"),
    ({"prefix": None}, "'prefix' must be a text or a whole number"),
    ({"prefix_tokens": -5}, "'prefix_tokens' must be a whole number from 0"),
    ({"new_tokens": 1e3}, "'new_tokens' must be a whole number"),
    ({"prefix_tokens": 0, "new_tokens": 0}, "the prompt has no tokens"),
    ({"appends": "yes"}, "'appends' must be true or false"),
    ({"time": None}, "'time' must be a time"),
]


@pytest.mark.parametrize(
    ("good", "change", "words"), [(MOONCAKE, *one) for one in WRONG] + [(COUNTS, *one) for one in WRONG_COUNTS]
)
def test_a_wrong_value_is_named_with_its_line(
    tmp_path: Path, good: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    path = write(tmp_path / "t.jsonl", good, good | change, good)
    with pytest.raises(BrokenTrace) as error:
        read_trace(path)
    assert str(error.value).startswith("t.jsonl, line 2: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe{}\n", "line 1: it is not UTF-8"),
        (b'{"timestamp": 1\n', "line 1: it is not JSON"),
        (b"[1, 2]\n", "line 1: it is not a JSON object"),
        (b"[" * 100_000, "line 1: it is not JSON"),
        (b"", "has no requests"),
        (b" \n\n", "has no requests"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(BrokenTrace, match=words):
        read_trace(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(good=st.sampled_from([MOONCAKE, COUNTS]), data=st.data(), value=json_values)
def test_any_value_is_read_or_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, good: dict[str, Any], data: st.DataObject, value: object
) -> None:
    name = data.draw(st.sampled_from([*good, "appends", "else"]))
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", good, good | {name: value})
    requests: Sequence[Request] = ()
    try:
        requests = read_trace(path).requests
    except BrokenTrace as error:
        refusal = str(error)
    assert requests or (refusal.startswith("any.jsonl, line 2: ") and "\n" not in refusal)
    assert all(len(one.blocks) <= (one.tokens - 1) // BLOCK and one.time >= 0 for one in requests)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no.jsonl", tmp_path):
        with pytest.raises(BrokenTrace, match="cannot be read"):
            read_trace(path)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(MOONCAKE) + "\r\n", encoding="utf-8-sig")
    assert len(read_trace(path).requests) == 1


# Generating.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_generated_traces_have_the_published_statistics(kind: str, seed: int) -> None:
    found, published = statistics_of(generate(kind, 3000, seed)), PUBLISHED[kind]
    assert found.requests == 3000
    assert found.tokens == pytest.approx(published.tokens, rel=0.2)
    assert found.output == pytest.approx(published.output, rel=0.15)
    assert found.shared == pytest.approx(published.shared, abs=0.06)
    assert found.requests / found.seconds == pytest.approx(published.per_second, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: str) -> None:
    assert generate(kind, 200, 3) == generate(kind, 200, 3)
    assert generate(kind, 200, 3) != generate(kind, 200, 4)
    assert generate(kind, 50, 3).requests == generate(kind, 200, 3).first(50).requests


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), requests=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_every_generated_request_can_be_served(kind: str, requests: int, seed: int) -> None:
    trace = generate(kind, requests, seed)
    assert len(trace.requests) == requests
    assert trace.requests[0].time == 0
    for request in trace.requests:
        assert 1 <= request.tokens <= LONGEST + 20_000
        assert len(request.blocks) == (request.tokens - 1) // BLOCK
        assert request.output >= 1


@pytest.mark.parametrize(("kind", "requests"), [("letters", 5), ("chat", 0)])
def test_what_cannot_be_generated_is_refused(kind: str, requests: int) -> None:
    with pytest.raises(ValueError, match=r"kind of trace|at least one request"):
        generate(kind, requests)


# What is stored.

paths = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=30)


@given(names=paths, capacity=st.integers(0, 12))
def test_a_store_holds_prefixes_and_no_more_than_fits(names: list[list[int]], capacity: int) -> None:
    store = LeastRecentlyUsed(capacity)
    for request in trace_of(names).requests:
        store.use(request.blocks)
        assert len(store) <= capacity
        kept = store.hits(request.blocks)
        assert kept == min(len(request.blocks), capacity)
        assert all(store.hits([block]) == 0 for block in request.blocks[kept:])


@given(names=paths, capacity=st.integers(0, 12))
def test_a_larger_store_hits_no_less(names: list[list[int]], capacity: int) -> None:
    trace = trace_of(names)
    small, large, all_of_it = hits_of(trace, capacity), hits_of(trace, capacity + 1), hits_of(trace)
    assert all(a <= b <= c for a, b, c in zip(small, large, all_of_it, strict=True))
    assert sum(all_of_it) * BLOCK == pytest.approx(statistics_of(trace).shared * sum(r.tokens for r in trace.requests))


def test_the_least_recently_used_prompt_is_evicted_from_its_end() -> None:
    trace = trace_of([[0, 0, 0], [1, 1], [0, 0, 0], [1, 1]])
    assert hits_of(trace, 4) == [0, 0, 2, 1]
    with pytest.raises(ValueError, match="cannot hold -1 blocks"):
        hits_of(trace, -1)


# Serving one request alone.

servings = st.builds(
    Serving,
    model=st.sampled_from(sorted(MODELS.values(), key=lambda model: model.name)),
    gpu=st.sampled_from(["A100", "H100"]),
    gpus=st.integers(1, 4),
    gbps=st.floats(1, 400),
    threads=st.integers(1, 4),
)


@settings(max_examples=60, deadline=None)
@given(serving=servings, blocks=st.integers(1, 48), share=st.floats(0, 1), suffix=st.integers(1, BLOCK))
def test_both_ends_are_no_slower_than_the_better_single_method(
    serving: Serving, blocks: int, share: float, suffix: int
) -> None:
    """With known costs, also where the prefix is stored only in part."""
    where = serving.setting(blocks, round(share * blocks), suffix)
    single = min(simulate(where, "compute").seconds, simulate(where, "load").seconds)
    assert simulate(where, "both").seconds <= NEVER_SLOWER * single


@settings(max_examples=15, deadline=None)
@given(names=paths, serving=servings, suffix=st.integers(1, BLOCK), capacity=st.none() | st.integers(0, 12))
def test_each_method_takes_what_it_says(
    names: list[list[int]], serving: Serving, suffix: int, capacity: int | None
) -> None:
    trace = trace_of(names, suffix)
    for request, visit in zip(trace.requests, visits_of(trace, serving, capacity), strict=True):
        blocks = len(request.blocks)
        where = serving.setting(blocks, visit.hits // BLOCK, suffix) if blocks else None
        assert visit.compute == pytest.approx(
            simulate(where, "compute").seconds if where else serving.suffix_seconds(0, suffix)
        )
        if visit.hits == 0:
            assert visit.load == visit.compute == pytest.approx(visit.both)
        for name in methods((1, 1024)):
            assert visit.seconds(name) in (visit.compute, visit.load, visit.both)
        assert visit.seconds(threshold(1)) == visit.load
        assert visit.seconds(threshold(visit.hits + 1)) == visit.compute
        assert visit.load >= max(visit.line, visit.rest) * (1 - TINY) or visit.hits == 0


def test_a_threshold_counts_stored_tokens() -> None:
    assert threshold(13_600) == "load from 13,600"
    assert [loads(threshold(1024), hits) for hits in (0, 512, 1024, 2048)] == [False, False, True, True]
    assert [loads(name, 4096) for name in (COMPUTE, LOAD, BOTH)] == [False, True, False]
    assert not loads(LOAD, 0)
    assert not loads(threshold(0), 0)


def test_what_serves_must_have_a_cost_curve() -> None:
    with pytest.raises(ValueError, match="no step times of a GPU 'V100'"):
        Serving(gpu="V100")
    with pytest.raises(ValueError, match="at least one GPU"):
        Serving(gpus=0)


# Waiting for the device.


def visit(time: float, compute: float, load: float, line: float = 0.0, rest: float = 0.0, hits: int = 512) -> Visit:
    return Visit(time, 1000, hits, compute, load, min(compute, load), line, rest)


def test_a_queue_by_hand() -> None:
    assert one_by_one([0, 1, 10], [3, 2, 1]) == [3, 5, 11]
    assert waits([0, 1, 10], [3, 5, 11]) == [3, 4, 1]
    # The second prefix is on the line while the device computes the rest of the first; the third loads nothing.
    visits = [visit(0, 9, 4, line=2, rest=2), visit(0, 9, 4, line=2, rest=2), visit(1, 5, 5, hits=0)]
    assert loads_ahead([0, 0, 1], visits, LOAD) == [8, 10, 6]
    assert loads_ahead([0, 0, 1], visits, threshold(1024)) == [9, 18, 23]


durations = st.floats(0.01, 10)


@given(
    rows=st.lists(
        st.tuples(st.floats(0, 100), durations, durations, durations, st.sampled_from([0, 512])),
        min_size=1,
        max_size=20,
    )
)
def test_loading_ahead_keeps_its_bounds(rows: list[tuple[float, float, float, float, int]]) -> None:
    visits = [
        visit(time, compute, line + rest if hits else compute, line, rest, hits)
        for time, compute, line, rest, hits in sorted(rows)
    ]
    arrivals = [one.time for one in visits]
    ends = loads_ahead(arrivals, visits, LOAD)
    assert all(
        end >= one.time + (one.rest + one.line if one.hits else one.compute) - TINY
        for end, one in zip(ends, visits, strict=True)
    )
    assert max(ends) <= max(one_by_one(arrivals, [one.load for one in visits])) + TINY


def test_arrivals_are_stretched_to_a_load_of_the_device() -> None:
    visits = [visit(3, 2, 1), visit(4, 2, 1), visit(7, 4, 1)]
    assert scaled_arrivals(visits, 0.5) == [0, 4, 16]
    assert scaled_arrivals(visits[:1], 0.5) == [0]
    for load in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="load must be"):
            scaled_arrivals(visits, load)


def test_percentiles_are_of_requests_that_there_are() -> None:
    assert spread(list(range(1, 101))) == {"mean": 50.5, "p50": 50, "p90": 90, "p99": 99}
    assert spread([7.0]) == {"mean": 7, "p50": 7, "p90": 7, "p99": 7}


def test_regret_by_hand() -> None:
    visits = [visit(0, 4, 2), visit(0, 1, 3), visit(0, 2, 2.05)]
    assert regret(visits, COMPUTE) == {"mean": pytest.approx(0.4), "p99": 1.0, "slower": pytest.approx(1 / 3)}
    assert regret(visits, BOTH) == {"mean": 0, "p99": 0, "slower": 0}
    assert regret([replace(visits[0], both=1.0)], LOAD)["mean"] == 1.0
    classes = by_class([visit(0, 1, 1, hits=hits) for hits in (0, 512, 2048, 8191, 40_000)])
    assert [(least, len(some)) for least, some in classes] == [(1, 1), (2048, 2), (8192, 0), (32_768, 1)]


# The whole replay.


def small_replay(**changes: Any) -> Replay:
    given: dict[str, Any] = {"bandwidths": (7.0, 100.0), "thresholds": (2048,), "gib": 64.0}
    return Replay(Serving(), **given | changes)


@pytest.fixture(scope="module")
def details() -> dict[str, Any]:
    return dict(small_replay().run(generate("agents", 60, 1)).details)


def test_a_replay_gives_the_same_numbers_again(details: dict[str, Any]) -> None:
    assert small_replay().run(generate("agents", 60, 1)).details == details
    assert json.loads(json.dumps(details)) == details


def test_a_replay_shows_where_thresholds_lose(details: dict[str, Any]) -> None:
    slow, fast = details["cells"]
    assert slow["hit_share"] == fast["hit_share"] > 0.1
    assert slow["regret"][LOAD]["mean"] > 0.5 > fast["regret"][LOAD]["mean"]
    assert fast["regret"][COMPUTE]["mean"] > 0.05 > slow["regret"][COMPUTE]["mean"]
    for cell in (slow, fast):
        assert cell["regret"][BOTH]["mean"] < 0.01
        assert min(cell["regret"].values(), key=lambda one: one["mean"]) == cell["regret"][BOTH]
        assert cell["methods"][BOTH]["per_second"] == pytest.approx(1 / cell["methods"][BOTH]["alone"]["mean"])
        assert all(one["queued"]["mean"] >= one["alone"]["mean"] for one in cell["methods"].values())
        assert {"ahead"} <= cell["methods"][LOAD].keys() - cell["methods"][BOTH].keys()


def test_a_smaller_store_hits_less(details: dict[str, Any]) -> None:
    tiny = small_replay(gib=1.0, bandwidths=(7.0,)).run(generate("agents", 60, 1)).details
    assert tiny["cells"][0]["hit_share"] < details["cells"][0]["hit_share"]  # type: ignore[index]


def test_the_first_requests_may_only_fill_the_store() -> None:
    trace = generate("agents", 60, 1)
    whole, warm = (visits_of(trace, Serving(), None, count) for count in (0, 40))
    assert [one.hits for one in warm] == [one.hits for one in whole[40:]]
    assert small_replay(warm=40, bandwidths=(7.0,)).run(trace).details["measured"] == 20
    with pytest.raises(ValueError, match="60 that only fill the store leave none"):
        small_replay(warm=60).run(trace)


def test_other_blocks_have_no_cost_curve() -> None:
    with pytest.raises(ValueError, match="blocks of 512 tokens, the trace has 16"):
        small_replay().run(replace(generate("chat", 2), block=16))


def test_the_command_reads_replays_and_renders(tmp_path: Path) -> None:
    trace, out, page = write(tmp_path / "mine.jsonl", MOONCAKE, MOONCAKE), tmp_path / "out.json", tmp_path / "page.md"
    run = run_benchmark(
        "traces", "simulate", "--trace", trace, "--kind", "chat", "--requests", 8, "--gbps", 32, "--gbps", 7,
        "--threshold", 512, "--gib", 8, "--model", "8B", "--gpu", "H100", "--out", out,
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "mine, 8B on H100, 32 Gbps: seconds to the first token" in run.output
    result = json.loads(out.read_text())
    assert result == json.loads(run.stdout.splitlines()[-1])
    assert list(result["results"]) == ["mine, 8B on H100", "chat, 8B on H100"]
    page.write_text("# Traces\n\n<!-- traces simulate -->\n<!-- end of traces simulate -->\n\nThe end.\n")
    run = run_benchmark("traces", "page", out, "--page", page)
    assert run.exit_code == 0, run.output
    shown = page.read_text()
    assert "### mine, 8B on H100" in shown
    assert "| load from 512 |" in shown
    assert shown.endswith("<!-- end of traces simulate -->\n\nThe end.\n")
    assert run_benchmark("traces", "page", out, "--page", page).exit_code == 0
    assert page.read_text() == shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "9B"], "no model '9B'"),
        (["--gpu", "T4"], "no step times"),
        (["--kind", "letters"], "no kind of trace 'letters'"),
        (["--trace", "no.jsonl"], "cannot be read"),
        (["--kind", "chat", "--kind", "agents", "--kind", "chat"], "Two traces are called 'chat'"),
        (["--load", "0", "--requests", "2", "--gbps", "32"], "load must be"),
        (["--gbps", "0", "--requests", "2"], "bandwidth must be"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(arguments: list[str], words: str) -> None:
    run = run_benchmark("traces", "simulate", *arguments)
    assert run.exit_code == 2
    assert words in run.output
    assert "Traceback" not in run.output


def test_a_page_or_result_that_is_none_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="0 places for traces simulate"):
        tables.fill(page, "traces simulate", "text")
    with pytest.raises(ValueError, match="There is no page"):
        tables.fill(tmp_path / "no.md", "traces simulate", "text")
    for content in ("{}", "no json"):
        with pytest.raises(ValueError, match=r"no result of|cannot be read"):
            command_module.page_command([write(tmp_path / "r.json", content)], page)
