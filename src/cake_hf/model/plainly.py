"""The exception by which code beneath a restore requests that the prompt be computed plainly."""

from __future__ import annotations

from cake_hf.report import Refusal


class ComputePlainly(Exception):
    """Not an error: a restore that has started turns out to be impossible.

    Attributes:
        refusal: why.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


def no_answer(trouble: str) -> Refusal:
    """Returns why a prompt is computed whose store failed, or did not answer in time."""
    return Refusal("store-not-asked", f"the store could not be asked: {trouble}")
