"""What all tests have in common: a machine may be slow, and no test is judged by that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from cake_hf.util.environment import limit_variable
from scripted import load_script
from waiting import PATIENCE

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

for limit in ("read_timeout", "lookup_timeout", "exit_flush_seconds"):
    # Also for what tests start in processes of their own. Tests of these variables, and of the defaults, do without.
    os.environ.setdefault(limit_variable(limit), f"{PATIENCE:g}")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the codecs in C, of the source as it is now."""
    path = load_script("build_native").build(tmp_path_factory.mktemp("native") / "_native.so")
    if path is None:
        pytest.skip("no C compiler here")
    assert isinstance(path, Path)
    return path
