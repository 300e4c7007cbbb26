"""The examples run, as scripts and as notebooks, and the notebooks that are kept are those of the scripts."""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbformat.v4 import new_output

from http_servers import require_server
from naming import in_this_version
from old_versions import OLD

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

import notebooks  # noqa: E402

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
MOST_BYTES = 300_000


def committed(name: str) -> Any:
    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def test_each_example_has_a_notebook() -> None:
    assert set(EXAMPLES) == {path.stem for path in (ROOT / "examples").glob("*.ipynb")}
    assert {"quickstart", "long_document", "chat", "packs", "serving", "tuning"} <= set(EXAMPLES)


@pytest.fixture
def quiet_log() -> Iterator[None]:
    """A script may choose how much the library says. That is for that script."""
    logger = logging.getLogger("cake_hf")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.usefixtures("quiet_log")
def test_the_script_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its assertions are about the answers; the pictures are written for those who see no notebook."""
    if OLD and "prefill_chunk_size=128)" in (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"):
        pytest.skip("older transformers cuts no prompt into chunks without a cache, with which the example compares")
    if name == "serving":
        require_server()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    script = tmp_path / f"{name}.py"
    script.write_text(in_this_version((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")), encoding="utf-8")
    scope = runpy.run_path(str(script), run_name="__main__")
    for value in scope.values():
        if hasattr(value, "cleanup"):
            value.cleanup()
    pictures = list(tmp_path.glob("*.png"))
    assert pictures
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_a_notebook_runs_and_shows_its_pictures() -> None:
    script = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    ran = notebooks.to_notebook(in_this_version(script))
    notebooks.execute(ran)
    shown = [output for cell in ran.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    assert any("cake_hf report" in output.get("text", "") for output in shown)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_notebook_is_in_step_with_the_script(name: str) -> None:
    made = notebooks.to_notebook((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"))
    kept = [(cell.cell_type, cell.source) for cell in committed(name).cells]
    advice = f"run: python scripts/notebooks.py --write {name}"
    assert kept == [(cell.cell_type, cell.source) for cell in made.cells], advice


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_notebook_was_run_in_order_and_tells_of_no_machine(name: str) -> None:
    kept = committed(name)
    nbformat.validate(kept)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert list(notebooks.complaints(kept)) == []
    text = (ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not any(place in text for place in ("/home/", "/Users/", "/tmp/", "site-packages"))
    assert len(text) < MOST_BYTES


def test_a_failing_cell_fails_the_notebook() -> None:
    """The negative control."""
    failing = notebooks.to_notebook("# %%\nprint('so far')\n\n# %%\nraise RuntimeError('no further')\n")
    with pytest.raises(notebooks.BadNotebook, match="no further"):
        notebooks.execute(failing)
    assert failing.cells[0].outputs[0].text == "so far\n"


def test_what_is_not_for_readers_is_found() -> None:
    shown = notebooks.to_notebook("# %%\n'a cell'\n")
    for output, complaint in [
        (new_output("stream", name="stderr", text="beware"), "complains: beware"),
        (new_output("stream", text=f"in {ROOT}/src"), "this machine"),
        (new_output("execute_result", data={"text/html": f"<b>{Path.home()}/kv</b>"}), "this machine"),
    ]:
        shown.cells[0].outputs = [output]
        assert any(complaint in found for found in notebooks.complaints(shown))
    shown.cells[0].outputs = [new_output("stream", text="all is well")]
    assert list(notebooks.complaints(shown)) == []


@pytest.mark.parametrize("source", ["", "print(1)\n# %%\n", "# %% [markdown]\nnot a comment\n"])
def test_a_script_that_is_not_a_notebook_is_refused(source: str) -> None:
    with pytest.raises(notebooks.BadNotebook):
        notebooks.to_notebook(source)


def test_cells_are_what_stands_between_marks() -> None:
    made = notebooks.to_notebook("# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\na = 1\n\n\n# %%\nb = '# %%'\n")
    assert [(cell.cell_type, cell.source) for cell in made.cells] == [
        ("markdown", "# Title\n\nText."),
        ("code", "a = 1"),
        ("code", "b = '# %%'"),
    ]
