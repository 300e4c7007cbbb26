"""README and performance page: snippets run as a reader would run them, and figures are those of result files."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from filling.pages import REPOSITORY
from snippets import found, reader, run, snippets

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
BENCHMARKS = ROOT / "benchmarks" / "results"
RAW = "https://raw.githubusercontent.com/cake-hf/cake-hf/main/"


def test_there_are_snippets() -> None:
    assert len(snippets(README)) >= 4


# The shortest call names no length, and transformers remarks on it.
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_snippets_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = snippets(README)
    scope: dict[str, Any] = {}
    with reader(tmp_path):
        run([*rest, first], "README.md", scope)  # the first one is the idea; model and inputs come with the quickstart
    assert "cake_hf report" in capsys.readouterr().out
    assert found(scope["cache"].report)
    assert list((tmp_path / ".cache" / "cake_hf").rglob("*.safetensors"))
    scope["cache"].close()


def test_the_readme_is_under_900_words() -> None:
    assert len(README.read_text().split()) < 900


def test_links_lead_somewhere_on_a_package_index_too() -> None:
    homepage = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
    assert f"{homepage}/blob/main/" == REPOSITORY
    assert homepage.replace("github.com", "raw.githubusercontent.com") + "/main/" == RAW
    targets = re.findall(r"\]\(([^)]+)\)", README.read_text())
    assert [target for target in targets if not target.startswith("https://")] == []
    starts = (REPOSITORY, REPOSITORY.replace("/blob/", "/tree/"), RAW)
    own = [target.removeprefix(start) for start in starts for target in targets if target.startswith(start)]
    assert len(own) == sum("cake-hf/cake-hf" in target for target in targets) > 8
    for target in own:
        name, _, section = target.partition("#")
        assert (ROOT / name).exists(), target
        if section:
            titles = re.findall(r"^#+ (.+)$", (ROOT / name).read_text(), re.MULTILINE)
            assert section in {title.lower().replace(" ", "-") for title in titles}, target


def test_the_promise_is_no_larger_than_what_is_kept() -> None:
    introduction = README.read_text().partition("```")[0]
    for words in ("*chunked* prefill", "prefill_chunk_size=C", "DynamicCache", "float32", "near tie"):
        assert words in introduction
    assert "Not run on a GPU yet" in README.read_text()


# Figures.


def result(name: str) -> Any:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())["results"]


def rows(page: Path, heading: str) -> list[list[str]]:
    """The figures of a table, the first one behind a heading; each row without its label."""
    lines = page.read_text().partition(f"\n## {heading}\n")[2].splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith("|---"))
    found = []
    for line in lines[begin + 1 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip(" *") for cell in line.strip("|").split("|")][1:])
    return found


def agree(shown: str, value: float) -> bool:
    """Whether a figure, rounded to as many places as are shown, is the one that is shown."""
    return f"{value:.{len(shown.partition('.')[2])}f}" == shown


def test_a_figure_that_is_not_measured_is_noticed() -> None:
    assert agree("1.45", 1.4477)
    assert agree("7", 6.77)
    assert not agree("1.44", 1.4477)
    assert not agree("1.023", 1.0196)


def test_the_table_at_a_glance_is_measured() -> None:
    measured = result("epyc-2-cores")
    shown = rows(PERFORMANCE, "At a glance")
    assert len(shown) == 3
    for ratio, (compute, *cells) in zip(("0.5", "1", "2"), shown, strict=True):
        assert agree(compute, measured["strategies"]["compute_seconds"]["value"])
        names = ("load_seconds", "both_seconds", "ratio", "eta")
        values = [measured["strategies"][f"{name}_at_{ratio}"]["value"] for name in names]
        assert [agree(cell, value) for cell, value in zip(cells, values, strict=True)] == [True] * len(names)
    assert f"after {measured['cached']['seconds']['value']:.2f} s" in PERFORMANCE.read_text()


COSTS = [
    ("", "cached/over_floor"),
    ("-1b-cached", "cached/over_floor"),
    ("-saving", "saving/first_token_ratio"),
    ("", "strategies/compute_over_plain"),
    ("", "decoding/ratio"),
    ("-decoding", "decoding/ratio"),
    ("-decoding", "decoding/first_ratio"),
    ("", "memory/chunks_per_thread"),
    ("", "identity/first_seconds"),
    ("", "overheads/named_milliseconds"),
    ("", "overheads/decision_microseconds"),
    ("", "loading/speed_fresh_1"),
    ("", "loading/speed_fresh_2"),
    ("", "loading/speed_touched_1"),
    ("", "loading/speed_touched_2"),
]
"""Where each row of the table of costs comes from: the end of a result file's name, and the way in it."""


@pytest.mark.parametrize(("column", "machine"), [(0, "epyc"), (1, "xeon")])
def test_costs_are_measured(column: int, machine: str) -> None:
    wrong = []
    for cells, (file, way) in zip(rows(PERFORMANCE, "What it costs"), COSTS, strict=True):
        group, name = way.split("/")
        if not agree(cells[column], result(f"{machine}-2-cores{file}")[group][name]["value"]):
            wrong.append(way)
    assert wrong == []


def test_shares_of_stores_are_measured() -> None:
    measured = result("xeon-2-cores-stores")
    stores = ("local", "memory", "redis", "s3", "mooncake", "pack", "hub", "tiers")
    for cells, store in zip(rows(PERFORMANCE, "The stores"), stores, strict=True):
        for threads, cell in enumerate(cells, 1):
            assert agree(cell, measured[store][f"share_{threads}"]["value"]), (store, threads)


def test_the_readmes_cost_of_chunks_is_the_measured_one() -> None:
    """README and page compare chunks with one forward; the page for three lengths, README for the longest."""
    whole = json.loads((BENCHMARKS / "epyc-2-cores-grid-whole.json").read_text())
    groups = sorted((one for one in whole["groups"] if one["shape"] == "small"), key=lambda one: one["tokens"])
    forward, chunks = (
        [f"{one[name]['value']:.2f} s" for one in groups] for name in ("one_forward_seconds", "compute_seconds")
    )
    page = re.sub(r"\s+", " ", PERFORMANCE.read_text())
    assert f"took {forward[0]}, {forward[1]} and {forward[2]} for 2,048, 4,096 and 8,192 tokens" in page
    assert f"compute-only {chunks[0]}, {chunks[1]} and {chunks[2]}" in page
    assert f"for 8,192 tokens {chunks[2]}, where one forward took {forward[2]}" in README.read_text()


GRIDS = (
    "epyc-2-cores-grid",
    "epyc-2-cores-grid-whole",
    "epyc-avx2-2-cores-grid",
    "xeon-2-cores-grid",
    "xeon-2-cores-grid-shared",
)


@pytest.mark.parametrize("name", GRIDS)
def test_the_goals_that_grids_kept_are_counted(name: str) -> None:
    summary = json.loads((BENCHMARKS / f"{name}.json").read_text())["summary"]
    page = re.sub(r"\s+", " ", PERFORMANCE.read_text())
    for goal in summary.values():
        if isinstance(goal, dict):
            met, judged = goal["met"], goal["judged"]
            assert f"{met} of {judged}" in page or (met == judged and f"all {judged} cells" in page)


def test_how_often_answers_differ_is_measured() -> None:
    measured = json.loads((ROOT / "eval" / "chunk_sizes.json").read_text())
    total = measured["rows"]
    of_128, of_512 = (measured["differing"][f"chunks of {size}"] for size in (128, 512))
    for page in (README, ROOT / "docs" / "guarantees.md"):
        text = re.sub(r"\s+", " ", page.read_text())
        assert measured["model"] in text
        assert f"{of_128} of {total} answers differed with chunks of 128" in text
        assert f"{of_512} of {total} with chunks of 512" in text
    low, high = (f"{end:.0%}".replace("%", " %") for end in measured["interval"]["chunks of 128"])
    assert f"{low} to {high}" in (ROOT / "docs" / "guarantees.md").read_text()


@pytest.mark.parametrize(
    ("dtype", "words"), [("bfloat16", "8 of 27 differed"), ("float32", "none of the same in float32")]
)
def test_how_often_random_weights_differ_is_measured(dtype: str, words: str) -> None:
    tasks = json.loads((ROOT / "eval" / "results" / f"llama-100m-{dtype}" / "metrics.json").read_text())["tasks"]
    runs = [task["modes"]["chunked"] for task in tasks.values()]
    count = sum(run["rows"] for run in runs)
    differing = round(sum(run["rows"] * (1 - run["tokens_as_single"]) for run in runs))
    assert (count, differing) == (27, 8 if dtype == "bfloat16" else 0)
    assert words in re.sub(r"\s+", " ", (ROOT / "docs" / "guarantees.md").read_text())
