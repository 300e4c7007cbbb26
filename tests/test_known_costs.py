"""`cake-hf plan` for a model and a store: costs that the store remembers, or that are measured on the spot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner, Result

from cake_hf import CakeCache, CakeError, LocalStore, MemoryStore, reads_only
from cake_hf.assets import RECALL_TINY
from cake_hf.cli import known_costs
from cake_hf.cli.app import app
from cake_hf.cli.known_costs import CostQuery, measure, remembered
from cake_hf.cli.models import load_model
from cake_hf.transfer.cost_notes import flush_notes
from naming import NAME
from waiting import PATIENCE

pytest_plugins = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

Command = Callable[..., Result]

CHUNK = 32


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `cake-hf plan` for the model that comes with the package, on the CPU."""
    monkeypatch.setenv("COLUMNS", "120")
    told = ("plan", "--model", str(RECALL_TINY), "--device", "cpu")
    return lambda *arguments: CliRunner().invoke(app, [*told, *(str(argument) for argument in arguments)])


def words(result: Result) -> str:
    """What was said, wherever lines were broken: that depends on how long the store's path is."""
    return " ".join(result.stdout.split())


def use(store: LocalStore | MemoryStore, *, times: int, chunk_size: int = CHUNK, chunks: int = 4) -> None:
    """A prompt as a user brings it, so often: the first time it is computed, then it is loaded, too."""
    model = load_model(str(RECALL_TINY), device="cpu")
    ids = torch.randint(
        0, model.config.vocab_size, (1, chunks * chunk_size + 1), generator=torch.Generator().manual_seed(chunks)
    )
    for number in range(times):
        with CakeCache(model, store, chunk_size=chunk_size, strategy="load" if number else "both") as cache:
            cache.prefill(ids)
            cache.flush()
    assert flush_notes(PATIENCE)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("used")
    use(LocalStore(folder), times=2)
    return folder


def test_what_the_store_remembers_is_found_by_the_models_name(command: Command, used: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in used.rglob("*")}
    result = command("--store", used, "--tokens", 20 * CHUNK + 5)
    assert result.exit_code == 0, result.output
    assert "of 20 chunks computed" in result.stdout
    assert f"chunks of {CHUNK} tokens" in words(result)
    assert "best" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in used.rglob("*")} == before  # planning only looks


@pytest.mark.parametrize(("tokens", "chunks"), [(CHUNK + 1, 1), (2 * CHUNK, 1), (2 * CHUNK + 1, 2)])
def test_one_token_is_left_to_run(command: Command, used: Path, tokens: int, chunks: int) -> None:
    result = command("--store", used, "--tokens", tokens)
    assert f"of {chunks} chunk" in result.stdout


def test_options_override_what_is_remembered(command: Command, used: Path) -> None:
    result = command("--store", used, "--tokens", 999, "--compute-base", 100, "--chunk-mib", 1, "--gbps", 1)
    assert "computing 100.00 s" in words(result)
    assert "1.0 MiB every 8.39 ms" in words(result)


def test_a_chunk_size_picks_among_namespaces(used: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(used, folder)
    store = LocalStore(folder)
    use(store, times=2, chunk_size=16, chunks=2)
    config = AutoConfig.from_pretrained(RECALL_TINY)
    sizes = {}
    for wanted in (None, 16, CHUNK, 64):
        found = remembered(store, CostQuery(str(RECALL_TINY), config, "cpu", wanted), lambda done, total: None)
        sizes[wanted] = found and found.chunk_size
    assert sizes == {None: CHUNK, 16: 16, CHUNK: CHUNK, 64: None}


def test_other_models_dtypes_and_devices_are_not_taken(used: Path) -> None:
    config = AutoConfig.from_pretrained(RECALL_TINY)
    other = AutoConfig.from_pretrained(RECALL_TINY)
    other.num_hidden_layers += 1
    store = LocalStore(used)
    name = str(RECALL_TINY)
    assert remembered(store, CostQuery(name, config, "cpu"), lambda done, total: None) is not None
    for wanted in (
        CostQuery("someone/else", config, "cpu"),
        CostQuery(name, other, "cpu"),
        CostQuery(name, config, "cuda:0"),
        CostQuery(name, config, "cpu", dtype="float16"),
    ):
        assert remembered(store, wanted, lambda done, total: None) is None


def test_what_is_half_known_needs_the_other_half(command: Command, tmp_path: Path) -> None:
    use(LocalStore(tmp_path), times=1)
    result = command("--store", tmp_path, "--tokens", 500)
    assert result.exit_code == 2
    assert "What loading costs with" in result.stderr
    assert "--measure" in result.stderr
    assert command("--store", tmp_path, "--tokens", 500, "--chunk-mib", 1, "--gbps", 1).exit_code == 0


def test_nothing_known_says_what_to_do(command: Command, tmp_path: Path) -> None:
    LocalStore(tmp_path).check_writable()
    result = command("--store", tmp_path, "--tokens", 500)
    assert result.exit_code == 2
    assert "What computing and loading costs with" in result.stderr
    assert result.stderr.count("\n") == 1


def test_measured_costs_are_noted_and_their_chunks_removed(command: Command, tmp_path: Path) -> None:
    store = tmp_path / "new"
    result = command("--store", store, "--tokens", 10 * CHUNK + 1, "--chunk-size", CHUNK, "--measure")
    assert result.exit_code == 0, result.output
    assert "of 10 chunks computed" in result.stdout
    assert list(LocalStore(store).keys()) == []  # what was made to be measured is gone
    assert flush_notes(PATIENCE)
    assert len(list((store / "notes").iterdir())) == 1  # and what was learnt is kept


def test_the_last_chunk_is_measured_where_it_stands() -> None:
    """How much later chunks cost more cannot be told from the first ones."""
    contexts: list[int] = []
    model = load_model(str(RECALL_TINY), device="cpu")

    def noted(module: torch.nn.Module, args: object, kwargs: dict[str, object]) -> None:
        cache = kwargs[NAME]
        if not isinstance(cache, CakeCache) and cache.get_seq_length():  # type: ignore[attr-defined]
            contexts.append(cache.get_seq_length())  # type: ignore[attr-defined]

    handle = model.register_forward_pre_hook(reads_only(noted), with_kwargs=True)
    found = measure(model, MemoryStore(), CHUNK, 9)
    assert contexts == [8 * CHUNK] * 2
    contexts.clear()
    measure(model, MemoryStore(), CHUNK, 4)
    handle.remove()
    assert contexts == []
    assert found.costs.compute is not None
    assert found.costs.load is not None


def test_a_store_that_takes_nothing_cannot_be_measured() -> None:
    class Refusing(MemoryStore):
        def write(self, *arguments: object, **options: object) -> bool:
            raise CakeError("full")

    with pytest.raises(CakeError, match="Costs cannot be measured with this model and store"):
        measure(load_model(str(RECALL_TINY), device="cpu"), Refusing(), CHUNK, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--store", "x"), "Give --model, --store and --tokens together"),
        (("--tokens", 5), "Give --model, --store and --tokens together"),
        (("--store", "USED", "--tokens", 0), "--tokens must be from 1 to"),
        (("--store", "USED", "--tokens", CHUNK), f"{CHUNK} tokens are less than one chunk of {CHUNK} and a token"),
        (("--store", "USED", "--tokens", 10**9), "the model was made for"),
        (("--store", "USED", "--tokens", 99, "--chunk-size", 1), "--chunk-size must be from 16 to"),
        (("--store", "USED", "--tokens", 99, "--device", "tpu"), "The device 'tpu' cannot be used"),
        (("--store", "nowhere", "--tokens", 99), "There is no store at nowhere"),
    ],
)
def test_out_of_range_is_one_sentence(
    command: Command, used: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = command(*(used if argument == "USED" else argument for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_measuring_needs_a_model(command: Command) -> None:
    result = CliRunner().invoke(app, ["plan", "--measure", "--chunks", "4"])
    assert result.exit_code == 2
    assert "--measure needs to know what to measure" in result.stderr


def test_names_are_those_in_the_chunks() -> None:
    assert CostQuery("org/model", None, "cpu").name == "org/model"
    assert CostQuery(str(RECALL_TINY), None, "cpu").name == RECALL_TINY.name
    assert known_costs.SHORT_CHUNKS >= 2  # a line needs two points
