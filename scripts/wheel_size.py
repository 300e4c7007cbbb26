"""How much Python the wheel has, folder by folder.

    python scripts/wheel_size.py [WHEEL]

Without a wheel one is built, for which hatchling has to be installed (it is in the environment of `make test`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent


class Size(NamedTuple):
    """Of a folder, or of all."""

    files: int
    lines: int


def build(folder: Path) -> Path:
    """Build this checkout's wheel into a folder, and return its path."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def sizes(wheel: Path) -> dict[str, Size]:
    """Folder of the package -> what it has, the largest first; what lies beside the folders is at ""."""
    found: dict[str, list[int]] = {}
    with ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                folder = name.split("/")[1] if name.count("/") > 1 else ""
                found.setdefault(folder, []).append(len(archive.read(name).splitlines()))
    by_size = sorted(found.items(), key=lambda item: -sum(item[1]))
    return {folder: Size(len(lines), sum(lines)) for folder, lines in by_size}


def total(found: dict[str, Size]) -> Size:
    """All folders together."""
    return Size(sum(size.files for size in found.values()), sum(size.lines for size in found.values()))


def main(arguments: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = sizes(Path(arguments[0]) if arguments else build(Path(folder)))
    for name, size in [*found.items(), ("together", total(found))]:
        print(f"{name or '(beside them)':<14}{size.lines:>8,} lines in {size.files:>3} files")


if __name__ == "__main__":
    main(sys.argv[1:])
