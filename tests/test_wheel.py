"""What is installed is the library: no measurements, no demonstration, no servers, and no more of it than there was."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

from scripted import load_script

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "cake_hf"
BESIDE = ("benchmarks", "demo", "eval", "tests", "training")
"""Folders of the repository that are not installed."""

MOST_LINES, MOST_FILES = 41_708, 240
"""Of Python. These are to fall: the goal is 15,000 in 100."""


LIBRARY = "cake_hf/chunks/_native.so"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    built: Path = load_script("wheel_size").build(tmp_path_factory.mktemp("wheel"))
    return built


def test_only_the_package_is_in_the_wheel(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"cake_hf"}
    own = {path.relative_to(SOURCE.parent).as_posix() for path in SOURCE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == own
    assert {"cake_hf/py.typed", "cake_hf/assets/recall-tiny/model.safetensors"} <= set(names)


def build(folder: Path, target: str, **environment: str) -> Path:
    """Build a wheel or an sdist, in that environment."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, **environment})
    [built] = folder.iterdir()
    return built


def test_the_codecs_library_is_in_it_where_there_is_a_compiler(wheel: Path) -> None:
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler here")
    names = ZipFile(wheel).namelist()
    assert LIBRARY in names
    assert not any(name.endswith((".c", ".h")) for name in names)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    [metadata] = [name for name in names if name.endswith(".dist-info/WHEEL")]
    assert "Root-Is-Purelib: false" in ZipFile(wheel).read(metadata).decode()


def test_without_a_compiler_it_is_for_all_platforms(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    wheel = build(tmp_path, "wheel", CC="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = ZipFile(wheel).namelist()
    assert LIBRARY not in names
    assert "cake_hf/chunks/lossless_numpy.py" in names


def test_an_sdist_has_what_a_build_needs(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    with tarfile.open(build(tmp_path, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"src/cake_hf/chunks/{name}" for name in ("lossless.c", "native.h", "lossy/lossy.c", "lossy/groups.h")}
    assert {*sources, "scripts/build_native.py", "pyproject.toml"} <= names
    assert f"src/{LIBRARY}" not in names


def test_no_measurement_and_no_demonstration_is_in_the_wheel(wheel: Path) -> None:
    parts = {part.removesuffix(".py") for name in ZipFile(wheel).namelist() for part in name.split("/")}
    assert not parts & {*BESIDE, "bench", "servers", "simulate", "simulator", "changes", "grid"}


def test_every_entry_point_is_in_the_wheel(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        [declared] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        parser = ConfigParser()
        parser.read_string(archive.read(declared).decode())
        names = set(archive.namelist())
    targets = [value for group in parser.sections() for value in parser[group].values()]
    assert len(targets) == 2
    for target in targets:
        assert target.split(":")[0].replace(".", "/") + ".py" in names


def test_the_wheel_does_not_grow(wheel: Path) -> None:
    script = load_script("wheel_size")
    found = script.sizes(wheel)
    size = script.total(found)
    assert size.lines == sum(len(path.read_bytes().splitlines()) for path in SOURCE.rglob("*.py"))
    assert size.files == len(list(SOURCE.rglob("*.py")))
    assert size.lines <= MOST_LINES
    assert size.files <= MOST_FILES


def test_the_script_prints_the_sizes_by_folder(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_script("wheel_size").main([str(wheel)])
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
