"""How code beneath a restore says that the prompt is to be computed plainly."""

from __future__ import annotations


class ComputePlainly(Exception):
    """Not an error: a restore that has begun turns out not to be possible. Its text is the reason."""
