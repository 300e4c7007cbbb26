"""The exception by which code beneath a restore requests that the prompt be computed plainly."""

from __future__ import annotations


class ComputePlainly(Exception):
    """Not an error: a restore that has started turns out to be impossible. The text is the reason."""
