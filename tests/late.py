"""A plugin that makes one thing late in every prompt, as it is on a machine that is busy: no test may depend on its time.

PYTHONPATH=tests CAKE_LATE=loaders:0.25 pytest -p late tests/test_gated.py
PYTHONPATH=tests CAKE_LATE=reports:0.02 pytest -p late tests/test_parity.py

What is late, and by how many seconds: `loaders` begin, `reports` of loads come behind their reads, `answers` of the store to
what it has, `steps` of the main thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from cake_hf.restore import prompt
from cake_hf.scheduling.frontier import Frontier
from cake_hf.transfer import loader


def late(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return call(*arguments, **options)

    return called


def late_answers(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def called(asked: Callable[..., Any], *arguments: Any) -> Any:
        return call(late(asked, seconds), *arguments)

    return called


WHAT: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "loaders": (loader, "run_loader", late),
    "reports": (Frontier, "settle", late),
    "answers": (prompt, "ask", late_answers),
    "steps": (Frontier, "advance", late),
}

if "CAKE_LATE" in os.environ:
    _what, _, _seconds = os.environ["CAKE_LATE"].partition(":")
    _place, _name, _wrap = WHAT[_what]
    setattr(_place, _name, _wrap(getattr(_place, _name), float(_seconds)))
