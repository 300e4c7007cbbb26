"""The limit that runs are measured against. The formula stands with the planner, which uses it, too."""

from __future__ import annotations

from cake_hf.arithmetic.planner import optimum

__all__ = ["optimum"]
