"""Pins: chunks that are not evicted until a date, listed in one small file in a store's directory.

Each line is a key and a date, in seconds since the epoch. The file is changed, and checked before an eviction, under the lock
of the store's byte count (see `byte_count`), so a chunk is safe as soon as it is pinned.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from cake_hf.stores.marker import PINS
from cake_hf.stores.safe_paths import directory, opened, replace_file, status_of

MAX_FILE_BYTES = 2**26
"""More than a million chunks."""

_LINE = re.compile(rb"([0-9a-f]{40}) ([0-9]{1,12})")

Mark = tuple[int, int, int] | None
"""Distinguishes versions of the file without reading it: inode, mtime and size."""


class Pins:
    """The file with the pins. Methods pass OSError through; callers of `change` hold the lock of the byte count."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def mark(self) -> Mark:
        """Returns a mark that differs after each change; None if there is no file."""
        with suppress(FileNotFoundError), directory(self._root) as root:
            found = status_of(PINS, root)
            return None if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)
        return None

    def read(self, now: float) -> dict[str, int]:
        """Returns the chunks that are pinned now: key -> end of the pin, in seconds since the epoch."""
        with (
            suppress(FileNotFoundError),
            directory(self._root) as root,
            opened(PINS, os.O_RDONLY, root) as (file, status),
        ):
            lines = os.pread(file, min(status.st_size, MAX_FILE_BYTES), 0).splitlines()
            found = (_LINE.fullmatch(line) for line in lines)
            return {line[1].decode(): int(line[2]) for line in found if line and int(line[2]) > now}
        return {}

    def change(self, pinned: Mapping[str, int], unpinned: Iterable[str], now: float) -> None:
        """Adds some pins and removes others; expired pins are removed, too."""
        wanted = {**self.read(now), **pinned}
        for key in unpinned:
            wanted.pop(key, None)
        text = "".join(f"{key} {until}\n" for key, until in sorted(wanted.items()))
        with directory(self._root) as root:
            replace_file(PINS, text.encode(), root)
