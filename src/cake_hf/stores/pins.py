"""Chunks that stay until a date, whatever has to make room: one small file in a store's directory.

Each line is a key and a date, in seconds since the epoch. It is changed, and looked at before something is evicted, under the
lock of the store's account (see `account`), so that what is pinned is safe from the moment in which it is.
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
"""What tells one content of the file from another without reading it."""


class Pins:
    """The file. Methods raise OSError as it comes; who calls `change` holds the lock of the account."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def mark(self) -> Mark:
        """Another one after each change; None where there is no file."""
        with suppress(FileNotFoundError), directory(self._root) as root:
            found = status_of(PINS, root)
            return None if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)
        return None

    def read(self, now: float) -> dict[str, int]:
        """Key -> until when it is pinned, in seconds since the epoch; of what is pinned now."""
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
        """Add some and take others away; those whose date has come go, too."""
        wanted = {**self.read(now), **pinned}
        for key in unpinned:
            wanted.pop(key, None)
        text = "".join(f"{key} {until}\n" for key, until in sorted(wanted.items()))
        with directory(self._root) as root:
            replace_file(PINS, text.encode(), root)
