"""The default budget of a directory: a share of the free disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

USUAL_SHARE = 0.2


@dataclass(frozen=True)
class FreeShare:
    """A share of the free space on a directory's disk plus the store's own bytes, so it does not shrink as the store grows.

    Stored chunks always fit: a store that is already larger, or that other processes fill beyond the share, just stops growing.

    Attributes:
        share: the share, above 0 and at most 1.
    """

    share: float = USUAL_SHARE

    def bytes_for(self, root: Path, stored: int) -> int | None:
        """Returns the budget in bytes; None if the free space is unknown.

        Args:
            root: the store's directory, which may not exist yet.
            stored: bytes of the stored chunks.
        """
        free = free_bytes(root)
        return None if free is None else max(int(self.share * (free + stored)), stored)

    def __str__(self) -> str:
        return f"{self.share:.0%} of the free disk".replace("%", " %")


USUAL = FreeShare()
"""The default budget of a directory."""


def free_bytes(root: Path) -> int | None:
    """Returns the bytes available to us on the disk of a directory, which may not exist yet; None if unknown."""
    for folder in (root, *root.parents):
        try:
            found = os.statvfs(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        # A network filesystem may report no blocks.
        return found.f_bavail * found.f_frsize if found.f_blocks else None
    return None
