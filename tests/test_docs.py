"""The documentation: it builds without a warning, it shows what stands elsewhere, and what it shows runs."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from transformers import LlavaForConditionalGeneration, cache_utils
from typer.testing import CliRunner

import cake_hf
from benchmarks.command import bench_app
from cake_hf import open_store
from cake_hf.cli.app import app
from cake_hf.layers.compat import is_older_than
from cake_hf.scheduling.costs import ComputeCost, Costs, LoadCost
from cake_hf.scheduling.planner import plan
from cake_hf.stores.hub import SCHEME, parse_hub_name
from cake_hf.testing import StoreContract
from filling.docstrings import show_examples
from filling.pages import REPOSITORY, CannotFill, fill
from filling.parity import FILES, all_runs
from filling.results import all_results, figures, one_result
from pictures import set_up_pictures
from snippets import found, reader, run, snippets
from test_hub import client, hub

__all__ = ["client", "hub"]  # fixtures that are used here, too

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HELP = DOCS / "does-it-help.md"
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
NOT_PAGES = {"families"}
PAGES = [page for page in sorted(DOCS.glob("*.md")) if page.stem not in NOT_PAGES]
QUICKSTART = 1
"""Which of the README's snippets makes the model, the tokenizer, a document and inputs. Pages go on from there."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    if is_older_than("5.20"):
        pytest.skip(
            "the reference describes the manager of continuous batching, which this version of transformers has not"
        )
    out = tmp_path_factory.mktemp("site")
    build(out)
    return out


def build(out: Path) -> str:
    """Build, a warning being an error, in a process without a GPU where whatever is fetched is refused; what it said."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(cake_hf.__path__[0]).parent),
        "CUDA_VISIBLE_DEVICES": "",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-b", "html", str(DOCS), str(out)]
    built = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stderr
    return built.stdout


def text_of(page: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


# The pages as they are built.


def test_every_page_is_built(site: Path) -> None:
    assert {page.stem for page in PAGES} <= {page.stem for page in site.glob("*.html")}
    assert "filled with" not in "".join(page.read_text(encoding="utf-8") for page in site.glob("*.html"))


def test_what_has_not_changed_is_not_built_again(site: Path) -> None:
    assert "0 added, 0 changed, 0 removed" in build(site)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("how-it-works", "Computing from the front"),
        ("models", "qwen3_next LinearAttentionLayer, DynamicLayer restored"),
        ("reference", "tokens per chunk, at least 16"),
        ("reference", "The cache then works as a plain cache: nothing more is restored or saved."),
        ("commands", "cake-hf verify [OPTIONS] {STORE}"),
        ("commands", "python -m benchmarks plot"),
        ("commands", "so --recompute needs them"),
        ("security", "Nothing from a store is executed."),
    ],
)
def test_pages_have_what_is_written_elsewhere(site: Path, page: str, words: str) -> None:
    source = (site / f"{page}.html").read_text(encoding="utf-8")
    assert words in text_of(site / f"{page}.html") or f'alt="{words}' in source


def test_every_result_file_is_shown_with_its_machine(site: Path) -> None:
    shown = text_of(site / "performance.html")
    assert RESULTS
    for file in RESULTS:
        result = json.loads(file.read_text())
        assert f"{file.stem}¶" in shown
        assert f"{result['machine']['cpu']}, {result['machine']['cores']} cores" in shown.replace("&amp;", "&")


# What is filled in.


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("nonsense", "Nothing is known by the name 'nonsense'"),
        ("file NO.md", "There is no file NO.md"),
        ("section README.md: No such thing", "has no section 'No such thing'"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_an_error(marker: str, words: str) -> None:
    with pytest.raises(CannotFill, match=re.escape(words)):
        fill(f"# Page\n\n<!-- filled with {marker} -->\n")


def test_a_section_is_taken_whole_and_alone() -> None:
    text, files = fill("<!-- filled with section CONTRIBUTING.md: A new store -->")
    assert text.startswith("Subclass `cake_hf.Store`")
    assert "Figures" not in text
    assert files == [ROOT / "CONTRIBUTING.md"]


def test_links_lead_to_pages() -> None:
    text, _ = fill("<!-- filled with file CONTRIBUTING.md -->\n<!-- filled with section README.md: Limits -->")
    assert "](architecture.md)" in text
    assert "ARCHITECTURE.md)" not in text


def test_absolute_links_lead_to_pages_too() -> None:
    """Those of the README, which also work on a package index. Files without a page keep their address."""
    text, _ = fill("<!-- filled with section README.md: Limits -->")
    assert "](guarantees.md#what-is-computed-plainly)" in text
    assert "](models.md)" in text
    assert "](security.md)" in text
    assert f"]({REPOSITORY}docs/" not in text
    assert f"]({REPOSITORY}benchmarks/results/epyc-2-cores-grid-whole.json)" in text


def scaled(part: Any, factor: float) -> Any:
    """A result as another run might have given it: all its figures are larger."""
    if isinstance(part, dict) and "label" in part:
        return {**part, **{name: part[name] * factor for name in ("value", "low", "high")}}
    if isinstance(part, dict):
        return {name: scaled(value, factor) for name, value in part.items()}
    return [scaled(value, factor) for value in part] if isinstance(part, list) else part


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_newer_result_takes_the_place_of_the_old_one(file: Path) -> None:
    old = json.loads(file.read_text())
    new = scaled(old, 1000.0)
    new["machine"] = {**old["machine"], "cpu": "Another Processor", "gpu": "Some GPU", "gpu_memory_gib": 80}
    shown, before = one_result(new), one_result(old)
    assert "Another Processor" in shown
    assert "Some GPU (80 GiB)" in shown
    # A grid's table leaves out what transformers alone took, which may be the greatest.
    value = max(figure["value"] for _, figure in figures(new) if f"{figure['value']:,.1f}" in shown)
    assert f"{value:,.1f}" not in before
    assert shown.count("\n|") == before.count("\n|")


def test_a_result_of_an_unknown_form_is_shown_all_the_same() -> None:
    figure = {"label": "seek", "value": 12.5, "low": 1.0, "high": 20.0, "unit": "ms", "goal": "<= 9", "met": False}
    machine = {"cpu": "X", "cores": 3, "load_average_before": 4.0}
    shown = one_result({"machine": machine, "news": [{"a": {"b": figure}}], "failures": ["it broke"]})
    assert "| a | seek, ms | 12.50 | 1.00 | 20.00 | <= 9 | **no** |" in shown
    assert "load average before it began: 4.0" in shown
    assert "Failed: it broke." in shown


def test_a_mismatch_is_not_hidden() -> None:
    parity = {"one": {"checks": 3, "mismatches": []}, "two": {"checks": 2, "mismatches": ["logits"]}}
    assert "4 of 5 checks" in one_result({"parity": parity})


def test_parity_runs_are_summed_up_over_their_tasks(tmp_path: Path) -> None:
    """Nothing rounds up to all, and what is not exact is said."""
    mode = {"rows": 3, "tokens_as_single": 1.0, "tokens_as_chunked": 1.0, "logits_as_chunked": 1.0, "loaded": 1.0}
    tasks = {
        "qasper": {"modes": {"warm": mode}},
        "lcc": {"modes": {"warm": mode | {"rows": 1, "logits_as_chunked": 0.0}}},
    }
    metrics = {"rows": 4, "tasks": tasks, "broken": ["x"], "differences": ["y"], "skipped": {"a": "b"}, "cut": 2}
    environment = {"numerics": {"dtype": "torch.bfloat16"}, "machine": {"cpu": "Another Processor"}}
    config = {"max_tokens": 8192, "chunk_size": 512}
    (tmp_path / "some-model").mkdir()
    for name, content in zip(FILES, (config, environment, metrics), strict=True):
        (tmp_path / "some-model" / name).write_text(json.dumps(content))
    shown = all_runs([tmp_path / "some-model"])
    assert "| some-model | bfloat16 | 4, 2 | warm | 4 | 100 % | 100 % | 75 % | 100 % |" in shown
    assert "Another Processor" in shown
    assert "**1 places are not exact.**" in shown
    tasks["lcc"]["modes"]["warm"]["logits_as_chunked"] = 0.9999
    (tmp_path / "some-model" / "metrics.json").write_text(json.dumps(metrics))
    assert "| 99.9 % |" in all_runs([tmp_path / "some-model"])


def test_all_results_have_a_section_each() -> None:
    assert re.findall(r"^## (.+)$", all_results(RESULTS), re.MULTILINE) == [file.stem for file in RESULTS]


def test_examples_in_docstrings_are_code_and_sections_are_not() -> None:
    lines = [
        "What it is.",
        "",
        "    cache = CakeCache(model)",
        "",
        "Args:",
        "    model: any.",
        "",
        "    It goes on.",
        "",
    ]
    show_examples(None, "class", "X", None, None, lines)
    assert lines[:5] == ["What it is.", "", "::", "", "    cache = CakeCache(model)"]
    assert lines.count("::") == 1


# What is shown is run.


@pytest.fixture
def reader_scope(tmp_path: Path, hub: object) -> Iterator[dict[str, Any]]:
    """On a reader's machine, what the quickstart has left."""
    scope: dict[str, Any] = {}
    with reader(tmp_path):
        run([snippets(ROOT / "README.md")[QUICKSTART]], "README.md", scope)
        yield scope


WITH_SNIPPETS = [page for page in PAGES if snippets(page)]

OUTCOMES = {
    "index": lambda scope: found(scope["cache"].report),
    "quickstart": lambda scope: found(scope["report"]),
    "chat": lambda scope: (
        scope["answer"].shape[1] > scope["prompt"].shape[1]
        and scope["report"].tails_loaded + scope["report"].tails_computed > 0
    ),
    "how-it-works": lambda scope: scope["cache"].report.timeline,
    "guarantees": lambda scope: found(scope["cache"].report),
    "does-it-help": lambda scope: found(scope["report"]),
    "disk-use": lambda scope: scope["report"].bytes_stored / scope["tokens"] >= 2 * 4 * 2 * 32 * 2,
    "gpu": lambda scope: scope["cache"].report.chunk_size == 1024 and scope["cache"].report.tokens > 1024,
    "lora": lambda scope: (
        all("made with" in scope["reports"]["first", name].reason for name in ("legal", "medical"))
        and all(found(scope["reports"]["second", name]) for name in ("legal", "medical"))
    ),
    "quantised": lambda scope: (
        found(scope["cache"].report) and scope["answer"].shape[1] > scope["inputs"].input_ids.shape[1]
    ),
    "methods": lambda scope: (
        scope["small"].report.bytes_after < scope["small"].report.bytes_before
        and scope["answer"].shape[1] > scope["question_ids"].shape[1]
        and scope["small"].report.tokens > scope["blended"].report.recomputed > 0
    ),
    "serving": lambda scope: (
        len(scope["answers"]) == 4
        and scope["response"].status == 200
        and scope["manager"].report(scope["request"]).restored > 0
    ),
    "vision": lambda scope: found(scope["second"][1]) and scope["other"][1].chunks_missed,
    "models": lambda scope: "none of the prompt's chunks yet" in scope["cache"].report.reason,
    "codecs": lambda scope: scope["cache"].report.tokens_lossy > 0,
    "stores": lambda scope: found(scope["other"].report) and "none of" in scope["cache"].report.reason,
    "sharing": lambda scope: scope["imported"].chunks and found(scope["cache"].report),
    "adding-a-store": lambda scope: list(scope["store"].keys()) and scope["cache"].report.tokens,
    "troubleshooting": lambda scope: scope["logging"],
}
"""What must be so when a page's snippets have run."""

UNSERVED = {}
"""Pages about what the installed version of transformers does not have, and why."""
if is_older_than("5.20"):
    UNSERVED["serving"] = "this version of transformers has another engine for continuous batching, or none"
if not hasattr(cache_utils, "Fp8QuantizedLayer"):
    UNSERVED["quantised"] = "this version of transformers quantises KV by other packages only"
if "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters:
    UNSERVED["vision"] = "this version of transformers cannot be given a part of an image"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the Hub's client and its own HTTP library
@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.stem)
def test_snippets_run(page: Path, reader_scope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := UNSERVED.get(page.stem):
        pytest.skip(reason)
    if page.stem == "vision":
        set_up_pictures(Path.cwd(), monkeypatch)
    run(snippets(page), page.name, reader_scope)
    assert OUTCOMES[page.stem](reader_scope)


class TestTheStoreOfThePage(StoreContract):
    """The store that people are shown keeps the contract that they are shown."""

    def make_store(self, tmp_path: Path) -> cake_hf.Store:
        scope: dict[str, Any] = {}
        run(snippets(DOCS / "adding-a-store.md")[:1], "adding-a-store.md", scope)
        store: cake_hf.Store = scope["DictStore"]()
        return store


def shown_commands() -> list[str]:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"^```console\n(.*?)^```", pages, flags=re.DOTALL | re.MULTILINE)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def parse(line: str) -> None:
    """As the command line would; nothing is run."""
    name, *arguments = shlex.split(line.replace("python -m benchmarks", "benchmarks"))
    command: Any = typer.main.get_command({"cake-hf": app, "benchmarks": bench_app}[name])
    while arguments and not arguments[0].startswith("-") and hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context(line, arguments)


@pytest.mark.parametrize("line", shown_commands())
def test_commands_are_understood(line: str) -> None:
    parse(line)


def test_a_command_that_is_not_there_is_noticed() -> None:
    assert len(shown_commands()) > 5
    with pytest.raises(Exception, match="No such option"):
        parse("cake-hf verify STORE --no-such-option")
    with pytest.raises(KeyError):
        parse("cake-hf no-such-command")


def test_the_plan_that_is_shown_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (shown,) = re.findall(r"^```text\n\$ cake-hf (plan .*?)^```", HELP.read_text(), flags=re.DOTALL | re.MULTILINE)
    line, _, screen = shown.partition("\n")
    printed = CliRunner().invoke(app, shlex.split(line)).stdout
    assert [row.rstrip() for row in printed.strip().splitlines()] == screen.strip().splitlines()
    assert max(map(len, screen.splitlines())) <= 80


@pytest.mark.parametrize(
    ("times", "least", "most"),
    [(0.02, 0.0, 0.1), (1.0, 0.45, 0.6), (4.0, 0.7, 0.95), (20.0, 0.95, 1.0)],
    ids=["far less", "about as long", "several times as long", "far longer"],
)
def test_the_rule_is_what_the_planner_finds(times: float, least: float, most: float) -> None:
    """Loading a chunk takes so many times as long as computing it: both ends over computing alone."""
    compute = ComputeCost(0.1, 0.0)
    load = LoadCost(latency=0.0, bandwidth=2**20 / (times * compute.base), chunk_bytes=2**20)
    made = plan(Costs(compute, load), [True] * 16)
    assert made.predicted_seconds is not None
    assert least <= made.predicted_seconds / made.curve[-1] <= most


def shown_urls() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", (DOCS / "stores.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_urls_of_stores_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "x"}
    account |= {"AZURE_STORAGE_ACCOUNT_NAME": "x", "AZURE_STORAGE_ACCOUNT_KEY": "eA==", "GOOGLE_SKIP_SIGNATURE": "true"}
    for name, value in account.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert {"file", "memory", "s3", "gs", "az", "redis", "rediss", "redis+unix", "mooncake", "hf", "pack"} <= {
        url.partition(":")[0] for url in shown_urls()
    }
    for url in shown_urls():
        if url.startswith(SCHEME):
            assert parse_hub_name(url)  # opening it would ask the Hub
        elif not url.startswith("pack:"):  # needs a pack; the page about sharing has one
            open_store(url.replace("///data", f"//{tmp_path}")).close()
