"""What is installed is the library: no measurements, no demonstration, no servers, and no more of it than there was."""

from __future__ import annotations

import ast
import importlib.util
from configparser import ConfigParser
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "cake_hf"
BESIDE = ("benchmarks", "demo", "eval", "tests", "training")
"""Folders of the repository that are not installed."""

MOST_LINES, MOST_FILES = 34_175, 240
"""Of Python. These are to fall: the goal is 15,000 in 100."""


def wheel_size() -> ModuleType:
    """The script that counts."""
    spec = importlib.util.spec_from_file_location("wheel_size", ROOT / "scripts" / "wheel_size.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    built: Path = wheel_size().build(tmp_path_factory.mktemp("wheel"))
    return built


def test_only_the_package_is_in_the_wheel(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"cake_hf"}
    own = {path.relative_to(SOURCE.parent).as_posix() for path in SOURCE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == own
    assert {"cake_hf/py.typed", "cake_hf/assets/recall-tiny/model.safetensors"} <= set(names)


def test_no_measurement_and_no_demonstration_is_in_the_wheel(wheel: Path) -> None:
    parts = {part.removesuffix(".py") for name in ZipFile(wheel).namelist() for part in name.split("/")}
    assert not parts & {*BESIDE, "bench", "servers", "simulate", "simulator", "changes", "grid"}


def test_what_it_declares_is_in_it(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        [declared] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        parser = ConfigParser()
        parser.read_string(archive.read(declared).decode())
        names = set(archive.namelist())
    targets = [value for group in parser.sections() for value in parser[group].values()]
    assert len(targets) == 2
    for target in targets:
        assert target.split(":")[0].replace(".", "/") + ".py" in names


def test_it_does_not_grow(wheel: Path) -> None:
    script = wheel_size()
    found = script.sizes(wheel)
    size = script.total(found)
    assert size.lines == sum(len(path.read_bytes().splitlines()) for path in SOURCE.rglob("*.py"))
    assert size.files == len(list(SOURCE.rglob("*.py")))
    assert size.lines <= MOST_LINES
    assert size.files <= MOST_FILES


def test_the_script_says_it(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel_size().main([str(wheel)])
    lines = capsys.readouterr().out.splitlines()
    assert {"cache", "stores", "cli", "together"} <= {line.split()[0] for line in lines}
    assert lines[-1].startswith("together")


def imported(source: str) -> set[str]:
    """First parts of the names of all modules that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


def test_the_package_imports_nothing_from_beside_it() -> None:
    users = {path.name: imported(path.read_text()) & set(BESIDE) for path in SOURCE.rglob("*.py")}
    assert {name: found for name, found in users.items() if found} == {}
    assert imported("def late():\n    from benchmarks.machine import describe") == {"benchmarks"}
