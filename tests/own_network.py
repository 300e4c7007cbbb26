"""Runs pytest in a network of its own, where a server that listens everywhere is not heard outside.

unshare --map-root-user --net ... python own_network.py PYTEST_ARGUMENTS
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def bring_up_loopback() -> None:
    """By the file alone, without what imports the package: pytest has to come before what it rewrites."""
    runpy.run_path(str(ROOT / "benchmarks/servers/own_network.py"))["bring_up_loopback"]()


if __name__ == "__main__":
    bring_up_loopback()
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
