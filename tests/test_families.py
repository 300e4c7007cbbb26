"""Every family of models gives what a chunked run gives, bit for bit; docs/families.md says how, and is up to date."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import cache_utils

from families import FAMILIES
from family_runs import Verdict, examine

TABLE = Path(__file__).parent.parent / "docs" / "families.md"


@pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    assert in_table(family) == examine(family), "make docs/families.md anew: python scripts/families.py"


def in_table(family: str) -> Verdict:
    """As the table says. It is made with the newest transformers; older ones have no layers for what keeps nothing."""
    verdict = rows()[family]
    if not hasattr(cache_utils, "DummyLayer"):
        verdict = replace(verdict, layers=verdict.layers.removesuffix(", DummyLayer"))
    return verdict


def rows() -> dict[str, Verdict]:
    table = TABLE.read_text().split("<!-- made by scripts/families.py -->")[1]
    cells = re.findall(r"^\| (\S+) \| (.*?) \| (.*?) \| (.*?) \|$", table, flags=re.MULTILINE)
    return {name: Verdict(layers, way, reason) for name, layers, way, reason in cells if name != "family"}


def test_the_table_has_these_families() -> None:
    assert list(rows()) == list(FAMILIES)
