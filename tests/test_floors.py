"""Imports go down the floors only, and every library stays on the floors that may know it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cake_hf
from source_imports import import_statements

SOURCE = Path(cake_hf.__path__[0])
FLOORS = [
    "util",
    "words",
    "scheduling",
    "chunks",
    "stores",
    "transfer",
    "layers",
    "model",
    "restore",
    "cache",
    "presses",
    "serving",
    "packs",
    "cli",
]
"""From the bottom up; each is a folder, but for the second one."""

WORDS = ("errors", "limits", "report", "blocks", "keys")
"""The files beside the folders, which make up the second floor."""

_PLAIN = {"torch", "numpy"}

LIBRARIES = {
    "util": set(),
    "words": set(),
    "scheduling": set(),
    "chunks": {*_PLAIN, "xxhash", "constriction", "triton"},
    "transfer": {*_PLAIN, "opentelemetry"},
    "layers": {"torch", "transformers", "packaging"},
    "model": {*_PLAIN, "transformers", "xxhash"},
    "restore": {*_PLAIN, "transformers"},
    "cache": {*_PLAIN, "transformers"},
    "presses": {"torch", "transformers", "safetensors"},
    "serving": {*_PLAIN, "transformers"},
    "packs": {"torch"},
}
"""What each floor may import besides the standard library. Each store has a client library of its own; see below."""

PLAIN_STORES = {
    "__init__",
    "byte_count",
    "base",
    "direct",
    "eviction",
    "folder",
    "background_queue",
    "local",
    "manifest",
    "memory",
    "mismatch",
    "opening",
    "pieces",
    "plugins",
    "redis_wire",
    "byte_budget",
    "specs",
    "health",
    "tier",
    "tiers",
    "wrappers",
}
"""Files of the store floor that no client library comes into."""

NOT_IN_STORES = {"transformers", "typer", "rich", "matplotlib", "pytest", "hypothesis"}


def floor_of(module: str) -> str:
    """The floor of a dotted module name. What lies beside the floors (the package's face, tools) is above all."""
    rooms = module.split(".")[1:]
    if rooms and rooms[0] in WORDS:
        return "words"
    return rooms[0] if rooms and rooms[0] in (*FLOORS, "testing") else "cli"


def imports(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Dotted names of all modules that a source imports, wherever in it; relative ones are made absolute."""
    found = set()
    for target, taken in import_statements(source, module, is_package=is_package):
        # `from cake_hf import stores` names a floor only together with what is taken from it.
        found |= {f"{target}.{name}" for name in taken} if target == "cake_hf" and taken else {target}
    return found


def complaints(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module imports and must not."""
    floor = floor_of(module)
    wrong = []
    for name in sorted(imports(source, module, is_package=is_package)):
        if name.split(".")[0] == "cake_hf":
            other = floor_of(name)
            if floor == "testing":
                allowed = other != "cli"
            else:
                allowed = other != "testing" and FLOORS.index(other) <= FLOORS.index(floor)
        else:
            allowed = may_use(module, name.split(".")[0])
        if not allowed:
            wrong.append(f"{module} imports {name}")
    return wrong


def may_use(module: str, library: str) -> bool:
    floor = floor_of(module)
    if library in sys.stdlib_module_names or floor in ("cli", "testing"):
        return True
    if floor == "stores":
        return module.split(".")[-1] not in PLAIN_STORES | {"stores"} and library not in NOT_IN_STORES
    return library in LIBRARIES[floor]


def all_modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found.append((".".join(["cake_hf", *(part for part in parts if part != "__init__")]), path))
    return found


@pytest.mark.parametrize(("module", "path"), all_modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_down(module: str, path: Path) -> None:
    assert complaints(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py") == []


def test_every_floor_is_looked_at() -> None:
    assert {floor_of(module) for module, _ in all_modules()} >= {*FLOORS, "testing"}


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("cake_hf.keys", "import hashlib", True),
        ("cake_hf.keys", "import torch", False),
        ("cake_hf.keys", "from cake_hf.chunks.codec import checksum", False),
        ("cake_hf.chunks.codec", "from cake_hf.errors import CorruptChunk", True),
        ("cake_hf.chunks.codec", "import torch.nn.functional as F", True),
        ("cake_hf.chunks.codec", "import transformers", False),
        ("cake_hf.chunks.codec", "from ..stores import base", False),
        ("cake_hf.chunks.codec", "from .layout import Piece", True),
        ("cake_hf.stores.base", "import torch", False),
        ("cake_hf.stores", "import obstore", False),
        ("cake_hf.stores.object", "import obstore", True),
        ("cake_hf.stores.object", "def late():\n    from transformers import AutoModel", False),
        ("cake_hf.stores.local", "from cake_hf.transfer import loader", False),
        ("cake_hf.transfer.loader", "from cake_hf.restore.restore import restore", False),
        ("cake_hf.transfer.loader", "from transformers.cache_utils import Cache", False),
        ("cake_hf.layers", "from transformers.cache_utils import Cache", True),
        ("cake_hf.restore.hook", "if TYPE_CHECKING:\n    from cake_hf.cli import app", False),
        ("cake_hf.restore.hook", "from cake_hf import cli", False),
        ("cake_hf.restore.hook", "from cake_hf import generate", False),
        ("cake_hf.restore.hook", "from cake_hf.testing import GateStore", False),
        ("cake_hf.restore.hook", "import rich", False),
        ("cake_hf.cli.app", "import rich\nfrom cake_hf.cache import CakeCache", True),
        ("cake_hf.cli.app", "from cake_hf.testing import StoreContract", False),
        ("cake_hf.testing.contract", "import pytest\nfrom cake_hf.cache import CakeCache", True),
        ("cake_hf.testing.contract", "from cake_hf.cli import app", False),
    ],
)
def test_the_check_tells_right_from_wrong(module: str, source: str, allowed: bool) -> None:
    """The negative control: without it, a check that finds nothing would look like a clean house."""
    assert (complaints(source, module, is_package=module == "cake_hf.stores") == []) is allowed


def test_pytest_comes_in_with_the_contract_only() -> None:
    users = {
        module
        for module, path in all_modules()
        if {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"), module)} & {"pytest", "hypothesis"}
    }
    assert users == {"cake_hf.testing.contract", "cake_hf.testing.read_only"}
