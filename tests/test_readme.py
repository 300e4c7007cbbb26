"""The README's snippets run, in order, as a reader would run them; only the model is a small one of our own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

import cake_hf

README = Path(__file__).parent.parent / "README.md"
MODEL = Path(cake_hf.__file__).parent / "assets" / "recall-tiny"
HIDDEN_PARAGRAPH = "Nobody knows who wrote this. It goes on like that for a while. " * 100


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_are_snippets() -> None:
    assert len(snippets()) >= 4


# The shortest call names no length, and transformers remarks on it.
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        real = loader.from_pretrained
        monkeypatch.setattr(loader, "from_pretrained", lambda name, real=real, **options: real(MODEL, **options))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-long-document.txt").write_text(HIDDEN_PARAGRAPH)
    first, *rest = snippets()
    scope: dict[str, Any] = {}
    for snippet in [*rest, first]:  # the first one is the idea; model and inputs come with the quickstart
        exec(compile(snippet, "README.md", "exec"), scope)
    assert "cake_hf report" in capsys.readouterr().out
    assert scope["cache"].report.chunks_loaded > 0
    assert list((tmp_path / ".cache" / "cake_hf").rglob("*.safetensors"))
    scope["cache"].close()


def test_files_that_the_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
