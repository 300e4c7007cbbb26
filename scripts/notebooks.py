"""Notebooks from the scripts in examples/, which are their only source: `# %%` begins a cell, `# %% [markdown]` one of text.

    python scripts/notebooks.py                      run all notebooks, into build/notebooks; exit code 1 if one fails
    python scripts/notebooks.py --write              the same, into examples/, to be committed with what they show
    python scripts/notebooks.py quickstart tuning    only these

Each runs in an empty folder, without a network. A cell that raises or complains is an error, and so is an output that tells of
this machine.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
BUILT = ROOT / "build" / "notebooks"

MARK = re.compile(r"^# %%(?P<text> \[markdown\])?$", flags=re.MULTILINE)
CELL_SECONDS = 120
"""Of a cell that hangs; none takes more than a few."""

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",  # bars and advice are noise a year later
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm asks for a package that draws its bars
    "OMP_NUM_THREADS": "1",  # models this small are slower on more threads, and far slower on a busy machine
}


class BadNotebook(Exception):
    """A notebook cannot be shown to people; the message says why."""


def scripts() -> list[Path]:
    """The sources of all notebooks."""
    return sorted(EXAMPLES.glob("*.py"))


def to_notebook(source: str) -> Any:
    """The notebook of a script, not run.

    Raises:
        BadNotebook: it does not begin with a cell, or a line of a text cell is no comment.
    """
    marks = list(MARK.finditer(source))
    if not marks or source[: marks[0].start()].strip():
        raise BadNotebook("The script must begin with `# %%` or `# %% [markdown]`.")
    ends = [mark.start() for mark in marks[1:]] + [len(source)]
    cells = []
    for number, (mark, end) in enumerate(zip(marks, ends, strict=True)):
        body = source[mark.end() : end].strip("\n")
        cell = new_markdown_cell(_uncommented(body)) if mark["text"] else new_code_cell(body)
        cell["id"] = f"cell-{number}"  # nbformat draws one at random, and then no two runs would be alike
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(notebook: Any) -> None:
    """Run it in place, in a folder of its own.

    Raises:
        BadNotebook: a cell raised, wrote to stderr, or showed something of this machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.record_timing = False
        try:
            client.execute(env={**os.environ, **SETTINGS})
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise BadNotebook(str(error)) from error
    notebook.metadata["language_info"] = {"name": "python"}
    for complaint in complaints(notebook):
        raise BadNotebook(complaint)


def complaints(notebook: Any) -> Iterator[str]:
    """What a reader should not see in its outputs."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                yield f"A cell complains: {output['text']}"
            for text in _texts(output):
                for place in _places():
                    if place in text:
                        yield f"An output tells of this machine ({place}): {text[:200]}"


def _places() -> set[str]:
    """Folders that only this machine has."""
    return {tempfile.gettempdir() + os.sep, sys.prefix, str(Path.home()) + os.sep, str(ROOT)}


def _texts(output: Any) -> Iterator[str]:
    if "text" in output:
        yield output["text"]
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield value


def _uncommented(body: str) -> str:
    lines = body.split("\n") if body else []
    if wrong := next((line for line in lines if line and not re.match(r"#( |$)", line)), None):
        raise BadNotebook(f"A line of a text cell is no comment: {wrong!r}")
    return "\n".join(line[2:] for line in lines if line).strip("\n")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which ones; by default all")
    parser.add_argument("--write", action="store_true", help="into examples/ instead of build/notebooks")
    options = parser.parse_args()
    target = EXAMPLES if options.write else BUILT
    target.mkdir(parents=True, exist_ok=True)
    chosen = [path for path in scripts() if not options.names or path.stem in options.names]
    if unknown := set(options.names) - {path.stem for path in chosen}:
        parser.error(
            f"there is no {', '.join(sorted(unknown))}; known are {', '.join(path.stem for path in scripts())}"
        )
    failed = 0
    for path in chosen:
        begin = time.monotonic()
        notebook = to_notebook(path.read_text(encoding="utf-8"))
        try:
            execute(notebook)
        except BadNotebook as error:
            failed += 1
            print(f"{path.name}: {error}", file=sys.stderr, flush=True)
            continue
        nbformat.validate(notebook)
        written = target / f"{path.stem}.ipynb"
        written.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        size = written.stat().st_size // 1024
        print(f"{written.relative_to(ROOT)}: {time.monotonic() - begin:.0f} s, {size} KiB", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
