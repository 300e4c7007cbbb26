"""Holds the results of all stages. It is replaced as a whole, so it is readable if the check is ended early."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Plain = dict[str, Any]

DONE, FAILED, CUT_SHORT, LEFT_OUT = "done", "failed", "cut short", "left out"
NOT_HERE = "not in this version"
NO_GPU = "no GPU"
RUNNING = "running"
"""What became of a stage. A stage that was cut short has the results that it had kept until then."""


class Outcome:
    """All results so far.

    Args:
        path: of the file.
        rehearsal: whether this is one; results of rehearsals and of others do not mix.
        adds: keep what is in the file already, but for the stages that are run again.
    """

    def __init__(self, path: Path, *, rehearsal: bool, adds: bool) -> None:
        self._path = path
        self.content: Plain = {"rehearsal": rehearsal, "machine": {}, "stages": {}}
        known = read(path) if adds else {}
        if known and known.get("rehearsal") == rehearsal:
            self.content.update(known)

    def put(self, name: str, stage: Plain) -> None:
        """Keep what a stage came to; the machine that it was run on becomes that of all."""
        machine = stage.pop("machine", None)
        if machine:
            self.content["machine"] = {**self.content["machine"], **machine}
        self.content["stages"][name] = stage
        write(self._path, self.content)


def read(path: Path) -> Plain:
    """The content of such a file; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, content: Plain) -> None:
    """Replace the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(partial, path)
