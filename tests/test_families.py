"""Every family of models gives what a chunked run gives, bit for bit; docs/families.md says how, and is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from cake_hf.layers.compat import NEWEST_TESTED, OLDEST
from families import FAMILIES
from family_runs import Verdict, examine

DOCS = Path(__file__).parent.parent / "docs"
TABLE, VERSIONS = DOCS / "families.md", DOCS / "versions.md"


@pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    """As docs/families.md says with the version that it was made with; as docs/versions.md says with the others it names."""
    verdict = examine(family)
    if transformers.__version__ == NEWEST_TESTED:
        assert rows()[family] == verdict, "make docs/families.md anew: python scripts/families.py"
    ways = versions().get(transformers.__version__)
    assert ways is None or ways[family] == verdict.way, "make docs/versions.md anew: make versions"


def versions() -> dict[str, dict[str, str]]:
    """For each version of docs/versions.md the way of each family."""
    lines = [line.split("|") for line in VERSIONS.read_text().splitlines() if line.startswith("|")]
    names, _, *table = [[cell.strip() for cell in line[1:-1]] for line in lines]
    return {name: {row[0]: row[1 + number] for row in table} for number, name in enumerate(names[1:])}


def test_versions_are_told_from_the_oldest_to_the_newest_tested() -> None:
    assert next(iter(versions())) == f"{OLDEST}.0"
    assert list(versions())[-1] == NEWEST_TESTED
    assert {way for ways in versions().values() for way in ways.values()} <= {"restored", "computed", "refused", "-"}
    assert versions()[NEWEST_TESTED] == {family: verdict.way for family, verdict in rows().items()}


def rows() -> dict[str, Verdict]:
    table = TABLE.read_text().split("<!-- made by scripts/families.py -->")[1]
    cells = re.findall(r"^\| (\S+) \| (.*?) \| (.*?) \| (.*?) \|$", table, flags=re.MULTILINE)
    return {name: Verdict(layers, way, reason) for name, layers, way, reason in cells if name != "family"}


def test_the_table_has_these_families() -> None:
    assert list(rows()) == list(FAMILIES)
