"""An environment for each system: made with venv and pip, or given ready."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import ROOT
from benchmarks.shootout.systems import SystemSpec

INSTALL_SECONDS = 1800.0
PROBE_SECONDS = 300.0
DISK = "disk"
DISK_STEPS = (("mfusepy==3.1.1",),)
LONGEST_REASON = 600
INSTALLED = ".installed"
"""Marks an environment in which every installation has succeeded."""

_REST = """
import sys
from importlib.metadata import requires
from packaging.requirements import Requirement
for line in requires(sys.argv[1]) or ():
    wanted = Requirement(line)
    if wanted.name not in sys.argv[2:] and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        print(str(wanted).split(";")[0])
"""
"""Prints what a distribution requires here, without some."""


@dataclass(frozen=True)
class Environment:
    """Where a system runs.

    Attributes:
        python: the interpreter; empty if it cannot run here.
        reason: why it cannot.
    """

    python: str
    reason: str = ""


class Environments:
    """All of them.

    Args:
        folder: where they are made, and kept.
        ready: system -> interpreter of an environment that is there already.
        patience: seconds that one installation may take.
    """

    def __init__(self, folder: Path, ready: Mapping[str, str], patience: float = INSTALL_SECONDS) -> None:
        self._folder, self._ready, self._patience = folder, dict(ready), patience

    def find(self, spec: SystemSpec) -> Environment:
        """Returns where the system runs, or why it cannot."""
        if not spec.steps:
            return Environment(self._ready.get(spec.name, sys.executable))
        return self._made(spec.name, spec.steps, spec.rest_of, spec.probe)

    def disk(self) -> Environment:
        """Returns the environment of `slow_disk.py`."""
        if not os.path.exists("/dev/fuse"):
            return Environment("", "This machine has no /dev/fuse.")
        return self._made(DISK, DISK_STEPS, (), "import mfusepy")

    def _made(self, name: str, steps: Sequence[Sequence[str]], rest_of: Sequence[str], probe: str) -> Environment:
        folder = self._folder / name
        python, made = self._ready.get(name) or str(folder / "bin" / "python"), folder / INSTALLED
        if name in self._ready and not Path(python).exists():
            return Environment("", f"{python} is not there.")
        try:
            if name not in self._ready and not made.exists():
                venv.create(folder, with_pip=True)
                self._install(python, steps, rest_of)
                made.touch()
            _run([python, "-c", probe], PROBE_SECONDS)
        except subprocess.TimeoutExpired as error:
            asked = " ".join(str(word) for word in error.cmd[1:])
            return Environment("", f"Not done after {error.timeout:.0f} s: {asked[:LONGEST_REASON]}")
        except (OSError, RuntimeError) as error:
            return Environment("", str(error)[-LONGEST_REASON:])
        return Environment(python)

    def _install(self, python: str, steps: Sequence[Sequence[str]], rest_of: Sequence[str]) -> None:
        pip = [python, "-m", "pip", "install", "-q"]
        for step in steps:
            _run([*pip, *step], self._patience)
        if rest_of:
            _run([*pip, "packaging"], self._patience)
            wanted = _run([python, "-c", _REST, *rest_of], PROBE_SECONDS).split("\n")
            _run([*pip, *filter(None, wanted)], self._patience)


def variables(spec: SystemSpec, python: str, threads: int) -> dict[str, str]:
    """Returns the variables of a system's processes: the checkout on the path, the threads, and what the system wants."""
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    path = os.environ.get("PYTHONPATH", "") if python == sys.executable else ""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), path])), **spec.variables}
    found |= {"OMP_NUM_THREADS": str(threads)}
    return found | ({"LD_PRELOAD": str(openmp)} if spec.variables and openmp.exists() else {})


def _run(command: Sequence[str], seconds: float) -> str:
    environment = {**os.environ, "PYTHONPATH": ""}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    if ran.returncode:
        said = [line for line in (ran.stderr or ran.stdout).strip().splitlines() if not line.startswith("WARNING")]
        last = [line.strip() for line in said if not line.startswith("  ")][-2:]
        raise RuntimeError(" ".join(last) or f"exit code {ran.returncode}")
    return ran.stdout
