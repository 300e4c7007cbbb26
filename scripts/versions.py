"""Make docs/versions.md: run every family of tests/families.py on a row of transformers versions and write down how it fares.

    python scripts/versions.py

Each version is installed into an environment of its own that borrows all other packages from the one that runs this. The text
around the table is kept. Takes about a minute per version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "versions.md"
sys.path.insert(0, str(ROOT / "src"))

from cake_hf.layers.compat import NEWEST_TESTED, OLDEST  # noqa: E402  # found by the line above

VERSIONS = [f"{OLDEST}.0", "5.2.0", "5.3.0", "5.5.4", "5.10.4", "5.16.1", "5.17.0", "5.20.2", "5.23.0", NEWEST_TESTED]
"""Where something changed for us, and what people with a pinned version are likely to have."""

EXAMINE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from families import FAMILIES
from family_runs import examine
print("\\n" + json.dumps({family: examine(family).way for family in FAMILIES}))
"""


def main() -> None:
    ways = {version: examine(version) for version in VERSIONS}
    rows = [f"| {family} | {' | '.join(found[family] for found in ways.values())} |" for family in ways[NEWEST_TESTED]]
    rows = [f"| family | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|", *rows]
    begin, end = "<!-- made by scripts/versions.py -->", "<!-- end -->"
    table = "\n".join([begin, "", *rows, "", end])
    PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: table, PAGE.read_text(), flags=re.DOTALL))


def examine(version: str) -> dict[str, str]:
    """How each family fares with that version of transformers.

    Raises:
        CalledProcessError: a restored prompt is not exact there, or the version cannot be installed.
    """
    print(f"transformers {version} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(Path(folder), version)
        paths = os.pathsep.join(str(ROOT / part) for part in ("src", "tests"))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(python), "-c", EXAMINE], env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=folder
        )
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_environment(folder: Path, version: str) -> Path:
    """An environment with that version, and with all else of the one that runs this; returns its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    inside = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    borrowed = sysconfig.get_path("purelib")
    Path(inside, "borrowed.pth").write_text(f"import sys; sys.path.append({borrowed!r})\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run([*command, f"transformers=={version}"], check=True)
    return python


if __name__ == "__main__":
    main()
