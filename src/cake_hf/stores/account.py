"""How many bytes a directory of chunks has: one number in a small file, changed under a lock that all processes share.

The number is a convenience, not the truth; the truth is in the directory. It errs on the safe side, since bytes are counted
before they are there and until after they are gone: a process that is killed in between leaves a number that is too large,
and one who needs room looks at the directory itself before it believes that there is none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cake_hf.arithmetic.errors import StoreError
from cake_hf.stores.folder import try_lock

PATIENCE = 30.0
"""Seconds to wait for the lock. It is held for a look at the directory at most, unless its holder is stopped."""

_PAUSE = 0.002
_DIGITS = 20


class Balance:
    """The number, while the lock is held.

    Attributes:
        total: bytes; None where the file has no number (yet).
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        text = os.pread(descriptor, _DIGITS, 0)
        self.total = int(text) if len(text) == _DIGITS and text.isdigit() else None

    def set(self, total: int) -> int:
        """Replace the number, and give it back; a write of a few bytes is there whole or not at all, whoever is killed."""
        os.pwrite(self._descriptor, b"%0*d\n" % (_DIGITS, total), 0)
        self.total = total
        return total

    def add(self, nbytes: int) -> int:
        """Change the number by so many bytes, and give it back. Where it is not known it stays so, and counts as 0."""
        return 0 if self.total is None else self.set(max(0, self.total + nbytes))


class Account:
    """The file with the number. It is there as soon as one process keeps a budget, and from then on all writers keep it."""

    def __init__(self, file: Path, patience: float = PATIENCE) -> None:
        self._file = file
        self._patience = patience

    @contextmanager
    def opened(self, *, create: bool = False) -> Iterator[Balance | None]:
        """The balance, locked; None where there is no account and none is to be made.

        Raises:
            StoreError: another process holds the lock for too long.
            OSError: the file cannot be opened.
        """
        descriptor = self._lock(create)
        if descriptor is None:
            yield None
            return
        try:
            yield Balance(descriptor)
        finally:
            os.close(descriptor)

    def _lock(self, create: bool) -> int | None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                descriptor = os.open(self._file, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
            except FileNotFoundError:
                if create:
                    raise
                return None
            try:
                self._wait(descriptor, deadline)
                # Somebody may delete the file at any time. A lock on one without a name keeps nobody out.
                if os.fstat(descriptor).st_nlink:
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _wait(self, descriptor: int, deadline: float) -> None:
        while not try_lock(descriptor):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"Another process has held the lock on {self._file} for {self._patience:g} s; if it is stopped, let it "
                    "go on or end it."
                )
            time.sleep(_PAUSE)
