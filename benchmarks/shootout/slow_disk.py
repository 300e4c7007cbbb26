"""A directory seen through FUSE, on which reads are as slow as asked, or never come back.

    python -m benchmarks.shootout.slow_disk SOURCE MOUNTPOINT PACE

It needs /dev/fuse, libfuse and the package mfusepy, in an environment of its own. PACE is a file with a number of megabytes
per second, with HANG, or with nothing: then reads are as fast as they come. It is read again when a file is opened.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

HANG = "hang"
BLOCK = 1 << 20


class Pace:
    """What reads wait for: one disk for all files, so one clock."""

    def __init__(self, file: Path) -> None:
        self._file, self._free, self._lock = file, 0.0, threading.Lock()
        self._rate = 0.0

    def look(self) -> None:
        """Reads the file again."""
        said = self._file.read_text().strip()
        self._rate = -1.0 if said == HANG else float(said or 0) * 1e6

    def wait(self, nbytes: int) -> None:
        """Waits as long as the disk takes for that many bytes."""
        if self._rate < 0:
            threading.Event().wait()
        if self._rate:
            with self._lock:
                self._free = max(self._free, time.monotonic()) + nbytes / self._rate
                until = self._free
            time.sleep(max(0.0, until - time.monotonic()))


class Through:
    """The file operations: each does the same in the source directory. The method names are those of FUSE."""

    use_ns = True

    def __init__(self, source: str, pace: Pace) -> None:
        self._source, self._pace = source, pace

    def _at(self, path: str) -> str:
        return self._source + path

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Tells size, times and kind."""
        found = os.lstat(self._at(path))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        times = {f"st_{name}time": getattr(found, f"st_{name}time_ns") for name in "amc"}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        """Lists a directory."""
        return [".", "..", *os.listdir(self._at(path))]

    def open(self, path: str, flags: int) -> int:
        """Opens a file, and looks how fast the disk is now."""
        self._pace.look()
        return os.open(self._at(path), flags & ~os.O_DIRECT)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        """Makes a file."""
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Reads at the pace."""
        found = os.pread(fh, size, offset)
        self._pace.wait(len(found))
        return found

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """Writes, as fast as it goes."""
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Sets a file's size."""
        os.truncate(self._at(path), length)
        return 0

    def release(self, path: str, fh: int) -> int:
        """Closes a file."""
        os.close(fh)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        """Brings a file to the disk."""
        os.fsync(fh)
        return 0

    def rename(self, old: str, new: str, flags: int = 0) -> int:
        """Renames."""
        os.rename(self._at(old), self._at(new))
        return 0

    def link(self, target: str, source: str) -> int:
        """Makes a hard link."""
        os.link(self._at(source), self._at(target))
        return 0

    def unlink(self, path: str) -> int:
        """Removes a file."""
        os.unlink(self._at(path))
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        """Makes a directory."""
        os.mkdir(self._at(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        """Removes a directory."""
        os.rmdir(self._at(path))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        """Sets the mode."""
        os.chmod(self._at(path), mode)
        return 0

    def utimens(self, path: str, times: tuple[int, int]) -> int:
        """Sets the times."""
        os.utime(self._at(path), ns=times)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        """Tells how full the disk is."""
        found = os.statvfs(self._at(path))
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_namemax")
        return {name: getattr(found, name) for name in names}


def main() -> int:
    """Serves until it is killed or unmounted."""
    import mfusepy  # type: ignore[import-not-found]  # it is in the other environment

    source, mountpoint, pace = sys.argv[1:]

    class Operations(Through, mfusepy.Operations):  # type: ignore[misc]
        """With mfusepy's answers for what is not done here."""

    mfusepy.FUSE(Operations(source, Pace(Path(pace))), mountpoint, foreground=True, max_read=BLOCK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
