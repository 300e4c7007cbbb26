"""What happens to a store between two questions, and how it is copied and measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TOP_OF_THE_EXPONENT = 0x40
"""The bit of a little-endian float's last byte that turns a usual value into a huge one."""


def files(store: Path) -> list[Path]:
    """Returns the files, the largest first."""
    found = [path for path in store.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(found, key=lambda path: (-used(path), path.name))


def data_files(store: Path) -> list[Path]:
    """Returns those with KV: all within a factor of ten of the largest."""
    found = files(store)
    return [path for path in found if used(path) * 10 >= used(found[0])]


def used(path: Path) -> int:
    """Returns the bytes that a file or a directory takes on the disk; holes take none, nor does what has just gone."""
    if path.is_dir():
        return sum(used(one) for one in path.rglob("*") if one.is_file() and not one.is_symlink())
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def flip(store: Path) -> str:
    """Flips a byte in the middle of each file with KV: the last byte of a four-byte word."""
    for path in data_files(store):
        at = _middle(path) // 4 * 4 + 3
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ TOP_OF_THE_EXPONENT]))
    return f"one byte in each of {len(data_files(store))} files"


def truncate(store: Path) -> str:
    """Cuts each file with KV in the middle of what it has."""
    found = data_files(store)
    for path in found:
        os.truncate(path, _middle(path))
    return f"{len(found)} files"


def delete(store: Path) -> str:
    """Deletes one file with KV, the middle one by name."""
    found = sorted(data_files(store))
    found[len(found) // 2].unlink()
    return f"1 of {len(found)} files"


def _middle(path: Path) -> int:
    """Returns the middle of a file; of one with holes, the middle of as many bytes as it takes on the disk."""
    return min(path.stat().st_size, used(path)) // 2


def copy(store: Path, target: Path) -> Path:
    """Copies a store, holes as holes."""
    subprocess.run(["cp", "-a", "--sparse=always", store, target], check=True, timeout=300)
    return target
