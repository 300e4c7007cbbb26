"""The `CAKE_HF_*` variables: what is read is what is told, arguments go first, and a bad value is named."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cake_hf
from cake_hf import CakeCache, CakeError, Limits, StoreError, open_store
from cake_hf.util import environment
from cake_hf.util.environment import limit_variable
from commands import flat, run_command
from models import prompt, shared_model

SOURCE = Path(cake_hf.__path__[0])
ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "environment.md"
LIMITS = {
    "loader_threads": ("7", 7),
    "read_timeout": ("2.5", 2.5),
    "lookup_timeout": ("1m", 60.0),
    "save_queue_bytes": ("4GB", 4 * 10**9),
    "tier_queue_bytes": ("4GB", 4 * 10**9),
    "device_decode_bytes": ("1GiB", 2**30),
    "exit_flush_seconds": ("90s", 90.0),
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is set here, whatever the developer's shell says."""
    for name in [name for name in os.environ if name.startswith("CAKE_HF_")]:
        monkeypatch.delenv(name)


class Watched(dict[str, str]):
    """An environment that notes which of our variables are asked for."""

    def __init__(self) -> None:
        super().__init__(os.environ)
        self.asked: set[str] = set()

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
        if name.startswith("CAKE_HF_"):
            self.asked.add(name)
        return super().get(name, default)


def documented() -> dict[str, str]:
    """Variable -> its example, from the table."""
    return dict(re.findall(r"^\| `(CAKE_HF_\w+)` \|.*\| `(.+?)` \|$", DOC.read_text(), flags=re.MULTILINE))


def strings(source: str) -> Iterator[str]:
    """All strings of a source that are not documentation."""
    tree = ast.parse(source)
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


def test_the_documentation_lists_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    monkeypatch.setattr(os, "environ", watched)
    with pytest.raises(StoreError):
        CakeCache(shared_model("llama"))
    assert watched.asked == set(documented())


def test_only_one_file_reads_environment_variables() -> None:
    """So that the test above sees them all."""
    users = {
        path.relative_to(folder).as_posix()
        for folder in (SOURCE, ROOT / "benchmarks", ROOT / "demo")
        for path in folder.rglob("*.py")
        if any("CAKE_HF_" in text for text in strings(path.read_text(encoding="utf-8")))
    }
    assert users == {"util/environment.py"}
    assert list(strings('"""CAKE_HF_A"""\nx = "CAKE_HF_B"')) == ["CAKE_HF_B"]


def test_the_examples_of_the_documentation_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, example in documented().items():
        monkeypatch.setenv(name, example)
    assert Limits.from_environment() != Limits()


def test_a_cache_takes_its_limits_and_its_store_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (text, _) in LIMITS.items():
        monkeypatch.setenv(limit_variable(name), text)
    monkeypatch.setenv("CAKE_HF_STORE", str(tmp_path / "store"))
    with CakeCache(shared_model("llama"), chunk_size=16) as cache:
        cache.prefill(prompt())
        assert cache._session.limits == Limits(**{name: value for name, (_, value) in LIMITS.items()})
    assert list((tmp_path / "store").rglob("*.safetensors"))


def test_arguments_take_precedence_over_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKE_HF_STORE", "s4://nowhere")
    monkeypatch.setenv("CAKE_HF_LOADER_THREADS", "many")
    with CakeCache(shared_model("llama"), tmp_path, limits=Limits()) as cache:
        assert cache._session.limits.loader_threads == 2
    assert Limits.from_environment(loader_threads=5) == Limits(loader_threads=5)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKE_HF_LOADER_THREADS", "")
    monkeypatch.setenv("CAKE_HF_STORE", " ")
    assert Limits.from_environment() == Limits()
    with pytest.raises(StoreError, match=r"^No store is named: .* set the variable CAKE_HF_STORE to one\.$"):
        open_store()


def test_every_limit_has_a_variable() -> None:
    assert set(LIMITS) == set(Limits.__dataclass_fields__)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("text", ["many", "0", "-1", "nan", "inf", "1e3", "2 apples"])
def test_a_bad_value_is_named_in_one_sentence(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(limit_variable(name), text)
    with pytest.raises(ValueError, match=rf"^{limit_variable(name)} cannot be used: '{text}' is .*\.$") as caught:
        CakeCache(shared_model("llama"), "memory:")
    assert "\n" not in str(caught.value)


def test_a_fraction_of_a_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKE_HF_LOADER_THREADS", "2.5")
    with pytest.raises(ValueError, match=r"'2\.5' is not a whole number"):
        Limits.from_environment()


def test_a_bad_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAKE_HF_STORE", "s4://nowhere")
    for attempt in (open_store, lambda: cake_hf.generate(shared_model("llama"), prompt())):
        with pytest.raises(CakeError, match=r"^CAKE_HF_STORE cannot be used: Unknown store URL 's4://nowhere'"):
            attempt()


def test_commands_know_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.STORE, str(tmp_path / "store"))
    with CakeCache(shared_model("llama"), chunk_size=16) as cache:
        cache.prefill(prompt())
    told = run_command("info")
    assert told.exit_code == 0, told.output
    assert run_command("info", tmp_path / "store").stdout == told.stdout
    monkeypatch.delenv(environment.STORE)
    told = run_command("info")
    assert told.exit_code == 2
    assert "Missing argument 'STORE'" in flat(told.stderr)


def test_help_names_the_variable() -> None:
    for command in ("warm", "ls", "info", "verify", "gc"):
        assert environment.STORE in flat(run_command(command, "--help").stdout), command
