"""Disks that are full, slow or hang: mounted for a trial, and gone after it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.children import ROOT
from benchmarks.shootout.environments import Environment
from benchmarks.shootout.slow_disk import HANG

MOUNT_SECONDS = 30.0


class NoDisk(RuntimeError):
    """Such a disk cannot be made here; the message says why."""


@contextmanager
def full_disk(mountpoint: Path, nbytes: int) -> Iterator[Path]:
    """Yields a directory on a file system with so much room.

    Raises:
        NoDisk: nothing may be mounted here.
    """
    mountpoint.mkdir(parents=True)
    _command(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(mountpoint)])
    try:
        yield mountpoint
    finally:
        _command(["umount", "-l", str(mountpoint)])


class SlowDisk:
    """A directory as seen through FUSE.

    Args:
        environment: of `slow_disk.py`.
        source: the directory.
        work: an empty folder for the mount and what belongs to it.

    Raises:
        NoDisk: it cannot be mounted here.
    """

    def __init__(self, environment: Environment, source: Path, work: Path) -> None:
        if not environment.python:
            raise NoDisk(environment.reason)
        self.path, self._pace = work / "mount", work / "pace"
        self.path.mkdir(parents=True)
        self.set_pace("")
        command = [
            environment.python,
            "-m",
            "benchmarks.shootout.slow_disk",
            str(source),
            str(self.path),
            str(self._pace),
        ]
        with (work / "log").open("wb") as log:
            self._server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=_plain_environment())
        end = time.monotonic() + MOUNT_SECONDS
        while not self.path.is_mount():
            if self._server.poll() is not None or time.monotonic() > end:
                self.close()
                raise NoDisk((work / "log").read_text(errors="replace")[-300:])
            time.sleep(0.02)

    def set_pace(self, pace: str) -> None:
        """Sets megabytes per second, HANG, or "" for as fast as it goes; it holds for files opened from now on."""
        self._pace.write_text(pace)

    def close(self) -> None:
        """Ends the server first: what waits for it gets an error, and can end."""
        self._server.kill()
        self._server.wait()
        subprocess.run(["umount", "-l", str(self.path)], capture_output=True, timeout=MOUNT_SECONDS, check=False)


@contextmanager
def hanging_disk(environment: Environment, source: Path, work: Path) -> Iterator[Path]:
    """Yields the directory as seen through a disk that is found, lists its files, and never answers a read."""
    disk = SlowDisk(environment, source, work)
    disk.set_pace(HANG)
    try:
        yield disk.path
    finally:
        disk.close()


def _plain_environment() -> Mapping[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def _command(command: list[str]) -> None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=MOUNT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoDisk(str(error)) from error
    if ran.returncode:
        raise NoDisk(ran.stderr.strip() or f"{command[0]} failed")
