"""The two consoles, and the form of an error: one sentence, no traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from cake_hf.errors import CakeError
from cake_hf.util.redaction import shown

# Most of what is printed comes from outside (paths, keys, messages of servers), so none of it is read as markup or emoji names.
# Coloured parts are a `Text` or have a style.
console = Console(highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

WRONG = 1
"""Exit code of a command that did its work and found something wrong."""
FAILED = 2
"""Exit code of a command that could not do its work."""
STOPPED = 130
"""Exit code of a command that Ctrl-C stopped: 128 plus the signal's number, as in shells."""


class PlainErrors(TyperGroup):
    """A group of commands that shows an expected error as one red sentence; these messages already say what to do."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (CakeError, ValueError) as error:
            errors.print(Text(shown(error), style="bold red"))
            raise typer.Exit(FAILED) from error


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar until the work is done; yields a function to be called with (done, all)."""
    described = TextColumn("{task.description}", markup=False)
    columns = (described, BarColumn(), MofNCompleteColumn(), TextColumn(unit, markup=False))
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
