"""What all tests have in common: a machine may be slow, and no test is judged by that."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from cake_hf.util.environment import limit_variable
from waiting import PATIENCE

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

for limit in ("read_timeout", "lookup_timeout", "exit_flush_seconds"):
    # Also for what tests start in processes of their own. Tests of these variables, and of the defaults, do without.
    os.environ.setdefault(limit_variable(limit), f"{PATIENCE:g}")
