"""Other papers' methods in turns: a document is restored and pressed once, before any question is known.

Each question is then asked on a copy, with the questions before it, as in SCBench.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.traces.turns import Answered, Method, Steps, Turn, prefilled
from cake_hf.presses import Blend, Press, PressedCache
from eval.methods.contestants import contestants
from eval.methods.runs import PART


def paper_methods(kernels: Path | None, shared: Path | None) -> dict[str, Method]:
    """Returns the methods of `python -m eval.methods` that change a restored cache, by name; arguments are those there."""
    found = contestants(kernels, shared)
    return {name: pressing(method) for name, method in found.items() if method is not None}


def pressing(method: Press | Blend) -> Method:
    """Returns a method that asks all questions on copies of one pressed cache. The document was stored before."""

    def answer(model: Any, document: torch.Tensor, turns: Sequence[Turn]) -> Answered:
        parts = document.split(PART, dim=1) if isinstance(method, Blend) else [document]
        with tempfile.TemporaryDirectory(prefix="cake-turns-") as store:
            for part in parts:
                prefilled(model, store, part).close()
            steps = Steps(bring=lambda: _pressed(model, store, parts, method), make=copy.deepcopy)
            return steps.run(model, document, turns)

    return answer


def _pressed(model: Any, store: str, parts: Sequence[torch.Tensor], method: Press | Blend) -> PressedCache:
    with ExitStack() as stack:
        restored = (stack.enter_context(prefilled(model, store, part)) for part in parts)
        if isinstance(method, Blend):
            return method(model, restored, measure=False)
        return method(model, next(restored), measure=False)
