"""The README's snippets run, in order, as a reader would run them; only the model is a small one of our own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from snippets import found, reader, run, snippets

README = Path(__file__).parent.parent / "README.md"


def test_there_are_snippets() -> None:
    assert len(snippets(README)) >= 4


# The shortest call names no length, and transformers remarks on it.
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_snippets_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = snippets(README)
    scope: dict[str, Any] = {}
    with reader(tmp_path):
        run([*rest, first], "README.md", scope)  # the first one is the idea; model and inputs come with the quickstart
    assert "cake_hf report" in capsys.readouterr().out
    assert found(scope["cache"].report)
    assert list((tmp_path / ".cache" / "cake_hf").rglob("*.safetensors"))
    scope["cache"].close()


def test_files_that_the_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
