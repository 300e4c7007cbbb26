"""Make docs/families.md: run every family of tests/families.py through the parity runs and write down how it fares.

    python scripts/families.py

The text around the table is kept.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "families.md"
sys.path.insert(0, str(ROOT / "tests"))

from families import FAMILIES  # noqa: E402  # found by the line above
from family_runs import examine  # noqa: E402


def main() -> None:
    warnings.simplefilter("ignore")  # what transformers says about configs as small as these
    rows = ["| family | layers of its cache | how | reason |", "|---|---|---|---|"]
    for family in FAMILIES:
        verdict = examine(family)
        rows.append(f"| {family} | {verdict.layers} | {verdict.way} | {verdict.reason} |")
        print(rows[-1], flush=True)
    begin, end = "<!-- made by scripts/families.py -->", "<!-- end -->"
    table = "\n".join([begin, "", *rows, "", end])
    TABLE.write_text(re.sub(f"{begin}.*{end}", lambda _: table, TABLE.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
