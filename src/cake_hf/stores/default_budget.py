"""The default budget of a directory: a share of the free disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

USUAL_SHARE = 0.2


@dataclass(frozen=True)
class FreeShare:
    """A share of what is free on a directory's disk, and of what the store itself takes already: so it does not shrink as the
    store grows.

    What is there always fits: a store that is larger already, or that others fill beyond it, only grows no further.

    Attributes:
        share: above 0 to 1.
    """

    share: float = USUAL_SHARE

    def bytes_for(self, root: Path, stored: int) -> int | None:
        """The budget in bytes; None where the free space is not known.

        Args:
            root: the store's directory, or where it will be.
            stored: bytes of chunks that are there.
        """
        free = free_bytes(root)
        return None if free is None else max(int(self.share * (free + stored)), stored)

    def __str__(self) -> str:
        return f"{self.share:.0%} of the free disk".replace("%", " %")


USUAL = FreeShare()
"""Of a directory for which nobody has said another budget."""


def free_bytes(root: Path) -> int | None:
    """What is free for us on the disk of a directory, which may not be there yet; None where the system does not know."""
    for folder in (root, *root.parents):
        try:
            found = os.statvfs(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return (
            found.f_bavail * found.f_frsize if found.f_blocks else None
        )  # what is behind a network may know of no blocks
    return None
