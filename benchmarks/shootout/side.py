"""A system's own process: reads questions and writes answers, a line of JSON each.

    python -m benchmarks.shootout.side --module benchmarks.shootout.sides.ours ...

This runs in the system's environment, so only the standard library is imported at the top.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, TextIO

from benchmarks.shootout.questions import Question, System, parse

CLOSE = "close"
LONGEST_ERROR = 400


def serve(system: System, lines: Iterable[str], told: TextIO) -> None:
    """Answers each line until one says CLOSE, or there are no more; what the system raises is the answer."""
    for line in lines:
        asked = json.loads(line)
        if asked == CLOSE:
            _say(told, _caught(lambda: _closed(system)))
            return
        question = Question(**asked)
        _say(told, _caught(lambda question=question: asdict(system.ask(question))))  # type: ignore[misc]


def _closed(system: System) -> dict[str, Any]:
    system.close()
    return {"closed": True}


def _caught(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return act()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]}


def _say(told: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=told, flush=True)


def main() -> int:
    """Makes the system, says that it is ready, and serves."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes there
    options = parse(sys.argv[1:])
    try:
        made = importlib.import_module(options.module).make(options)
    except Exception as error:
        _say(told, {"error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]})
        raise
    _say(told, {"ready": True})
    serve(made, sys.stdin, told)
    told.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
