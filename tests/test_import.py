"""`import cake_hf` costs next to nothing, and what it is for does not bring what it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cake_hf
from old_versions import OLD

NOT_NEEDED = [
    *("rich", "typer", "click", "matplotlib"),  # people
    *("obstore", "redis", "mooncake", "blake3"),  # remote stores
    "opentelemetry.metrics",  # takes as long as all of the package
    *("datasets", "evaluate", "pandas", "pytest", "hypothesis", "IPython"),
    *("cake_hf.cli", "cake_hf.testing", "cake_hf.stores.object", "cake_hf.stores.redis", "cake_hf.stores.hub"),
]


def brought_by(statement: str, before: str = "pass") -> set[str]:
    """Modules that a statement imports in a fresh process, in which another one has run before."""
    code = f"""
import json, sys
{before}
there = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - there)))
"""
    paths = [str(Path(cake_hf.__path__[0]).parent)]
    code = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=280)
    return set(json.loads(done.stdout))


def test_the_package_itself_brings_nothing() -> None:
    brought = brought_by("import cake_hf; cake_hf.__version__, dir(cake_hf)")
    assert {name for name in brought if name.startswith("cake_hf")} == {"cake_hf"}
    assert not brought & {"torch", "transformers", "numpy", *NOT_NEEDED}


def test_an_error_s_class_does_not_bring_torch() -> None:
    brought = brought_by("from cake_hf import CakeError, Limits, Report")
    assert "cake_hf.report" in brought
    assert not brought & {"torch", "transformers", "numpy", "cake_hf.cache", *NOT_NEEDED}


def test_a_cache_brings_torch_transformers_and_a_checksum() -> None:
    brought = brought_by("from cake_hf import CakeCache, open_store, MemoryStore", before="import torch, transformers")
    assert "cake_hf.cache.cake_cache" in brought
    assert not brought & set(NOT_NEEDED)
    foreign = {name.split(".")[0] for name in brought} - set(sys.stdlib_module_names)
    # Python's own, which a build names after its platform: some machines ask sysconfig, others do not.
    foreign = {name for name in foreign if not name.startswith("_sysconfigdata")}
    # Tokenizers: older transformers bring it along with parts of theirs; still older ones bring all there is.
    assert OLD or foreign - {"cake_hf", "xxhash"} <= {"transformers", "tokenizers", "huggingface_hub", "torch"}


def test_every_name_of_the_face_is_found() -> None:
    assert set(cake_hf.__all__) == set(cake_hf._HOMES)
    assert set(cake_hf.__all__) <= set(dir(cake_hf))
    for name in cake_hf.__all__:
        assert getattr(cake_hf, name).__module__.startswith(cake_hf._HOMES[name])


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'cake_hf' has no attribute 'CakeCash'"):
        _ = cake_hf.CakeCash
    with pytest.raises(ImportError):
        from cake_hf import nothing_of_the_kind  # noqa: F401
