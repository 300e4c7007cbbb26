"""Runs pytest in a network of its own, where a server that listens everywhere is heard by nobody outside.

unshare --map-root-user --net ... python own_network.py PYTEST_ARGUMENTS
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path


def bring_up_loopback() -> None:
    """By the package's own file, but without the package: pytest has to come before what it rewrites."""
    found = importlib.util.find_spec("cake_hf")
    assert found is not None
    assert found.origin is not None
    runpy.run_path(str(Path(found.origin).parent / "people/servers/own_network.py"))["bring_up_loopback"]()


if __name__ == "__main__":
    bring_up_loopback()
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
