"""Time that a hypervisor gave to other machines: runs during that time say little about the library.

Linux counts it ("steal" in /proc/stat, see proc(5)). On a physical machine, and on other systems, it is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Ticks = tuple[int, int]
"""For all processors together since the system's start: how many ticks were stolen, and how many there were."""

LEAST_TICKS = 3
"""A tick is about 10 ms. One tick is a large share of a short run, and may stem from the time before it."""

_STOLEN, _KINDS = 7, 8
"""The columns after the eighth, of guests, are already counted in the first two."""


def ticks(source: Path = Path("/proc/stat")) -> Ticks:
    """Returns the system's counts so far; zeros if it does not count."""
    try:
        counted = [int(word) for word in source.read_text().split("\n", 1)[0].split()[1 : 1 + _KINDS]]
    except (OSError, ValueError):
        return 0, 0
    return (counted[_STOLEN], sum(counted)) if len(counted) == _KINDS else (0, 0)


class StolenTime:
    """Measures the share of the processors' time that was stolen since this was made.

    Args:
        read: returns the ticks.
    """

    def __init__(self, read: Callable[[], Ticks] = ticks) -> None:
        self._read = read
        self._begin = read()

    def share(self) -> float:
        """Returns the share, from 0 to 1; 0 for less than LEAST_TICKS."""
        stolen, total = (now - then for now, then in zip(self._read(), self._begin, strict=True))
        return stolen / total if stolen >= LEAST_TICKS else 0.0
