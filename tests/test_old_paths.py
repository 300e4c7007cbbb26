"""Import paths that documentation and examples named once still lead to the same objects."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest

import cake_hf.testing


@pytest.mark.parametrize(
    "name", ["FAULTS", "FaultStore", "GateStore", "ThrottledStore", "WrapperStore", "expected_faults"]
)
def test_stores_for_tests_are_found_under_their_old_path(name: str) -> None:
    assert getattr(import_module("cake_hf.stores.wrappers"), name) is getattr(cake_hf.testing, name)
    assert name in cake_hf.testing.__all__


def test_a_name_that_never_was_there_is_refused() -> None:
    with pytest.raises(ImportError, match="no_such_store"):
        from cake_hf.stores.wrappers import no_such_store  # noqa: F401


def test_a_store_around_a_store_brings_none_for_tests() -> None:
    code = "import sys, json, cake_hf.stores.wrappers; print(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not [name for name in json.loads(ended.stdout) if name.startswith("cake_hf.testing")]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("haystack:hide", "testing.haystack:hide"),
        ("models:RECALL_TINY", "assets:RECALL_TINY"),
        ("packs:export_pack", "packs:export_pack"),
        ("packs.publish:Pushed", "packs.publish:Pushed"),
        ("packs.importing:Imported", "packs.importing:Imported"),
        ("plots:plot_split", "plots:plot_split"),
    ],
)
def test_what_pages_and_examples_imported_is_found(old: str, new: str) -> None:
    def found(package: str, target: str) -> object:
        module, name = target.split(":")
        return getattr(import_module(f"{package}.{module}"), name)

    assert found("cake_hf.people", old) is found("cake_hf", new)
