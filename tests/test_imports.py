"""No module of the package imports, by whatever way round, itself.

All imports count: those at the top, those for the type checker alone, and those within functions, unless they are `LAZY`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import cake_hf
from source_imports import import_statements

SOURCE = Path(cake_hf.__path__[0])

LAZY: set[tuple[str, str]] = set()
"""Imports within functions that load a heavy library late, and do not count: (who imports, what). There is none."""


def modules_in(root: Path) -> dict[str, Path]:
    """Dotted name -> file of each module of the package."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join([root.name, *(part for part in parts if part != "__init__")])] = path
    return found


def imported(source: str, module: str, names: Iterable[str], *, is_package: bool = False) -> set[str]:
    """Which of these modules a module's source imports, wherever in it. `from package import module` is one of `module`."""
    known, found = set(names), set[str]()
    for target, taken in import_statements(source, module, is_package=is_package):
        inner = {f"{target}.{name}" for name in taken}
        found |= inner & known
        if not taken or inner - known:
            found.add(target)
    return {name for name in found & known if (module, name) not in LAZY}


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module, or of one that imports itself (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_ones: list[str] = []
    found = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        open_ones.append(name)
        for other in graph[name]:
            if other not in number:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in open_ones:
                lowest[name] = min(lowest[name], number[other])
        if lowest[name] == number[name]:
            place = open_ones.index(name)
            component = open_ones[place:]
            del open_ones[place:]
            if len(component) > 1 or name in graph[name]:
                found.append(sorted(component))

    for name in graph:
        if name not in number:
            visit(name)
    return found


def graph_of(root: Path) -> dict[str, set[str]]:
    modules = modules_in(root)
    return {
        name: imported(path.read_text(encoding="utf-8"), name, modules, is_package=path.name == "__init__.py")
        for name, path in modules.items()
    }


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = graph_of(SOURCE)
    assert len(graph) > 100
    assert sum(map(len, graph.values())) > 300  # the graph is not empty by mistake
    assert circles(graph) == []


@pytest.mark.parametrize(
    "first",
    [
        "import house.second",
        "from house.second import thing",
        "from house import second",
        "from . import second",
        "from .second import thing",
        "if TYPE_CHECKING:\n    from house.second import thing",
        "def late():\n    from house.second import thing",
        "class Late:\n    def load(self):\n        import house.second",
        "try:\n    import house.second\nexcept ImportError:\n    pass",
    ],
)
def test_a_circle_is_found(first: str, tmp_path: Path) -> None:
    """The negative control: each way of importing closes this one."""
    house = tmp_path / "house"
    house.mkdir()
    for name, source in {
        "__init__": "",
        "first": first,
        "second": "from house.third import x",
        "third": "from house.first import y",
        "beside": "import house.first",
    }.items():
        (house / f"{name}.py").write_text(source)
    assert circles(graph_of(house)) == [["house.first", "house.second", "house.third"]]


def test_a_package_is_a_module_too(tmp_path: Path) -> None:
    (tmp_path / "house" / "room").mkdir(parents=True)
    for name, source in {
        "__init__": "",
        "room/__init__": "from house.room.table import x",
        "room/table": "from house.room import y",
        "own": "import house.own",
    }.items():
        (tmp_path / "house" / f"{name}.py").write_text(source)
    assert sorted(circles(graph_of(tmp_path / "house"))) == [["house.own"], ["house.room", "house.room.table"]]


def test_two_ways_to_one_module_are_no_circle() -> None:
    assert circles({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []
    assert circles({"a": ["b"], "b": ["c", "a"], "c": ["d"], "d": ["c"]}) == [["c", "d"], ["a", "b"]]
