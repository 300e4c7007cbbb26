"""Packages that were brought along as wheels: unpacked for one check, since a wheel is an archive of what is to be imported."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path


def wheels_in(folder: Path) -> list[Path]:
    """The wheels of a folder.

    Raises:
        ValueError: there is no such folder, there are none in it, or one cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    found = sorted(folder.glob("*.whl"))
    if not found:
        raise ValueError(f"There are no wheels in {folder}.")
    for path in found:
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path.name} is no wheel.")
    return found


def unpack(wheels: Sequence[Path], folder: Path) -> None:
    """Unpack all of them into one folder, from which they can be imported; no installer and no index is needed for that."""
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
