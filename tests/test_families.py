"""Every family of models gives what a chunked run gives, bit for bit; docs/families.md says how, and is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from families import FAMILIES
from family_runs import Verdict, examine

TABLE = Path(__file__).parent.parent / "docs" / "families.md"


@pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    assert documented(family) == examine(family), "make docs/families.md anew: python scripts/families.py"


def documented(family: str) -> Verdict:
    rows = re.findall(r"^\| (\S+) \| (.*?) \| (.*?) \| (.*?) \|$", TABLE.read_text(), flags=re.MULTILINE)
    return next((Verdict(layers, way, reason) for name, layers, way, reason in rows if name == family), Verdict("", ""))


def test_the_table_has_no_other_families() -> None:
    names = re.findall(r"^\| (\S+) \|", TABLE.read_text(), flags=re.MULTILINE)
    assert names[2:] == list(FAMILIES)
