"""Child processes that import no more than they need, past the package's face, and so start in a tenth of a second."""

from __future__ import annotations

import subprocess
import sys

import cake_hf

FACELESS = """
import os, sys, types
package = types.ModuleType("cake_hf")
package.__path__ = [sys.argv.pop(1)]
sys.modules["cake_hf"] = package
"""
"""What such a child begins with. The face would bring in transformers, which takes seconds."""


def command_of(script: str, *arguments: object, bare: bool = True) -> list[str]:
    """The command line of a child.

    Args:
        script: finds its arguments from `sys.argv[1]` on.
        arguments: as strings.
        bare: without what is installed; half as long to start, and enough for directories.
    """
    options = ["-I", "-S"] if bare else []
    return [sys.executable, *options, "-c", FACELESS + script, cake_hf.__path__[0], *map(str, arguments)]


def start_child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A bare child with pipes to and from it."""
    return subprocess.Popen(command_of(script, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
