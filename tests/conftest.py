"""What all tests have in common: a machine may be slow."""

from __future__ import annotations

import os

from cake_hf.arithmetic.environment import limit_variable
from waiting import PATIENCE

for limit in ("read_timeout", "lookup_timeout", "exit_flush_seconds"):
    # Also for what tests start in processes of their own. Tests of these variables, and of the defaults, do without.
    os.environ.setdefault(limit_variable(limit), f"{PATIENCE:g}")
