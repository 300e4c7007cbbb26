"""Make docs/families.md: run every family of tests/families.py through the parity runs and write down how it fares.

    python scripts/families.py

The text around the tables is kept.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "families.md"
sys.path.insert(0, str(ROOT / "tests"))

from families import FAMILIES  # noqa: E402  # found by the line above
from family_runs import Verdict, examine  # noqa: E402
from vision_models import VISION  # noqa: E402
from vision_runs import examine_vision  # noqa: E402


def main() -> None:
    warnings.simplefilter("ignore")  # what transformers says about configs as small as these
    write_table("<!-- images: made by scripts/families.py -->", "<!-- images end -->", VISION, examine_vision)
    write_table("<!-- made by scripts/families.py -->", "<!-- end -->", FAMILIES, examine)


def write_table(begin: str, end: str, families: Iterable[str], examine_one: Callable[[str], Verdict]) -> None:
    """Put a row for each family between these two lines."""
    rows = ["| family | layers of its cache | how | reason |", "|---|---|---|---|"]
    for family in families:
        verdict = examine_one(family)
        rows.append(f"| {family} | {verdict.layers} | {verdict.way} | {verdict.reason} |")
        print(rows[-1], flush=True)
    table = "\n".join([begin, "", *rows, "", end])
    TABLE.write_text(re.sub(f"{begin}.*{end}", lambda _: table, TABLE.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
