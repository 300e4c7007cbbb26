"""Time that a hypervisor gave to other machines: what ran meanwhile says little about the library.

Linux counts it ("steal" in /proc/stat, see proc(5)). On a machine of one's own, and on other systems, it is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Ticks = tuple[int, int]
"""Of all processors together since the system's start: how many were stolen, and how many there were."""

LEAST_TICKS = 3
"""Ticks are some 10 ms long. Of a short run one is a large share, and may be owed to a time before."""

_STOLEN, _KINDS = 7, 8
"""The columns behind the eighth, of guests, are counted in the first two already."""


def ticks(source: Path = Path("/proc/stat")) -> Ticks:
    """What the system has counted so far; zeros where it does not count."""
    try:
        counted = [int(word) for word in source.read_text().split("\n", 1)[0].split()[1 : 1 + _KINDS]]
    except (OSError, ValueError):
        return 0, 0
    return (counted[_STOLEN], sum(counted)) if len(counted) == _KINDS else (0, 0)


class StolenTime:
    """Tells which share of the processors' time was stolen since this was made.

    Args:
        read: gives the ticks.
    """

    def __init__(self, read: Callable[[], Ticks] = ticks) -> None:
        self._read = read
        self._begin = read()

    def share(self) -> float:
        """From 0 to 1; 0 of less than LEAST_TICKS."""
        stolen, total = (now - then for now, then in zip(self._read(), self._begin, strict=True))
        return stolen / total if stolen >= LEAST_TICKS else 0.0
