"""Tests use the package as people do: by its public names, and by what these let a caller hand in.

Only unit tests of `UNIT_TESTED` need internals. The numbers here may only fall.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cake_hf
from source_imports import import_statements

TESTS = Path(__file__).parent
SOURCE = Path(cake_hf.__path__[0])
REFERENCE = TESTS.parent / "docs" / "reference.md"

UNIT_TESTED = ("scheduling", "transfer", "chunks", "util")
"""Folders of the package whose internals have unit tests."""

MOST_INTERNAL_IMPORTS = 202
"""Internal modules that tests import, counted in each file."""

MOST_PATCHES = 105
"""Calls that replace a name in the package, or in one of its objects."""


def documented() -> set[str]:
    """The modules that people import from: the faces, and the homes of what the reference names in full."""
    named = re.findall(r"auto\w+:: (cake_hf[\w.]*)\.\w+$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
    return {"cake_hf", "cake_hf.stores", "cake_hf.presses", "cake_hf.assets", "cake_hf.cli.app", *named}


def is_internal(module: str) -> bool:
    """Is it a module of the package, and neither documented nor, like all of `testing`, made for tests?"""
    return module.startswith("cake_hf.") and not module.startswith("cake_hf.testing") and module not in documented()


def home_of(module: str, name: str) -> str:
    """Where `from module import name` takes it from: the name may itself be a module."""
    path = SOURCE.joinpath(*module.split(".")[1:], name)
    return f"{module}.{name}" if path.with_suffix(".py").exists() or path.is_dir() else module


def internal_imports(source: str) -> set[str]:
    """Internal modules that a source imports, those with unit tests aside."""
    homes = {home for module, names in import_statements(source, "test") for home in homes_of(module, names)}
    return {home for home in homes if is_internal(home) and home.split(".")[1] not in UNIT_TESTED}


def homes_of(module: str, names: list[str]) -> list[str]:
    return [home_of(module, name) for name in names] if names and module.startswith("cake_hf") else [module]


def patches(source: str) -> int:
    """How many calls replace something in the package, or in an object that is not known to be another's."""
    tree = ast.parse(source)
    owners = dict(bound_names(tree))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return sum(
        call.func.attr in ("setattr", "setitem", "delattr", "delitem") and hits_package(call.args[0], owners)
        for call in calls
    )


def bound_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each name that an import, a class or an assignment binds, and the module of what it stands for."""
    owners: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            owners |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            owners |= {alias.asname or alias.name: str(node.module) for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            owners[node.name] = "test"
    yield from owners.items()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and root_of(node.value) in owners:
            yield node.targets[0].id, owners[root_of(node.value)]


def root_of(value: ast.expr) -> str:
    """The name that a chain of attributes and calls starts with."""
    while isinstance(value, ast.Attribute | ast.Call):
        value = value.func if isinstance(value, ast.Call) else value.value
    return getattr(value, "id", "")


def hits_package(target: ast.expr, owners: dict[str, str]) -> bool:
    if isinstance(target, ast.JoinedStr):
        target = target.values[0]
    if isinstance(target, ast.Constant):
        return str(target.value).startswith("cake_hf")
    return owners.get(root_of(target), "cake_hf").split(".")[0] == "cake_hf"


def excess(found: dict[str, int], most: int) -> str:
    """What a failing test says; empty if there are as many as written down."""
    total = sum(found.values())
    if total == most:
        return ""
    advice = (
        "write the smaller number down"
        if total < most
        else f"only {most} may be; use public names, or hand in what differs"
    )
    return f"{total}, {advice}: {dict(sorted(found.items(), key=lambda one: -one[1]))}"


def sources() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(TESTS.glob("*.py"))}


def test_no_more_tests_import_internals() -> None:
    found = {name: len(internal_imports(source)) for name, source in sources().items()}
    assert len(found) > 100
    assert excess({name: count for name, count in found.items() if count}, MOST_INTERNAL_IMPORTS) == ""


def test_no_more_of_the_package_is_patched() -> None:
    found = {name: patches(source) for name, source in sources().items()}
    assert excess({name: count for name, count in found.items() if count}, MOST_PATCHES) == ""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from cake_hf import CakeCache\nfrom cake_hf.testing.forgery import forge", set()),
        ("from cake_hf.stores.object import ObjectStore", set()),
        ("from cake_hf.scheduling import frontier\nimport cake_hf.chunks.codec", set()),
        ("import cake_hf.restore.plan", {"cake_hf.restore.plan"}),
        ("def late():\n    from cake_hf.restore import plan", {"cake_hf.restore.plan"}),
        ("from cake_hf.stores.base import Store", {"cake_hf.stores.base"}),
        ("from cake_hf.layers import TokenMajorLayer", {"cake_hf.layers"}),
    ],
)
def test_internal_imports_are_found(source: str, expected: set[str]) -> None:
    assert internal_imports(source) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("patch.setattr('cake_hf.cli.warm.Pace', None)", 1),
        ("patch.setattr(f'cake_hf.restore.{name}.pack', None)", 1),
        ("patch.setattr(CakeCache, 'flush', None)", 1),
        ("patch.setattr(plan.other, 'name', None)", 1),
        ("patch.setattr(store._budget, 'clock', None)", 1),
        ("patch.delattr(type(store), 'read')", 1),
        ("patch.setitem(plan.TABLE, 1, 2)", 1),
        ("patch.setattr(os, 'fsync', None)", 0),
        ("patch.setattr(os.path, 'exists', None)", 0),
        ("patch.setattr('os.replace', None)", 0),
        ("patch.setenv('CAKE_HF_STORE', 'x')", 0),
        ("one = os.path\npatch.setattr(one, 'exists', None)", 0),
        ("one = CakeCache()\npatch.setattr(one, 'flush', None)", 1),
    ],
)
def test_patches_are_found(line: str, expected: int) -> None:
    imports = "import os\nfrom cake_hf import CakeCache\nfrom cake_hf.restore import plan\n"
    assert patches(imports + line) == expected
