"""What documentation shows is run here as a reader would run it; only the model is a small one of our own."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers

import cake_hf
from cake_hf import Report
from naming import in_this_version

MODEL = Path(cake_hf.__file__).parent / "assets" / "recall-tiny"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Makes a chat model's tokenizer of ours: ChatML."""
DOCUMENT = "The author is not known. It goes on like that for a while. " * 100


QUANTISED = "quantization_config"
"""An option that our model is loaded without: the packages that it needs are not among those of the tests."""


def snippets(page: Path) -> list[str]:
    """The Python code of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def found(report: Report) -> bool:
    """Whether the store had all of the prompt. How much of it is loaded and how much computed is the machine's affair."""
    return report.chunks_missed == 0 and report.chunks_loaded + report.chunks_computed > 0


@contextmanager
def reader(home: Path) -> Iterator[None]:
    """In the body, home and working directory are that folder, which has a document, and every model is ours."""
    logger = logging.getLogger("cake_hf")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        for loader, chosen in (
            (transformers.AutoModelForCausalLM, {}),
            (transformers.AutoTokenizer, {"chat_template": TEMPLATE}),
        ):
            given = partial(loader.from_pretrained, MODEL, **chosen)
            patch.setattr(loader, "from_pretrained", partial(_load, given))
        patch.setenv("HOME", str(home))
        patch.chdir(home)
        (home / "a-long-document.txt").write_text(DOCUMENT)
        try:
            yield
        finally:
            logger.setLevel(level)


def _load(given: Callable[..., Any], name: str, **options: Any) -> Any:
    return given(**{option: value for option, value in options.items() if option != QUANTISED})


def run(blocks: Iterable[str], name: str, scope: dict[str, Any]) -> None:
    """Run blocks one after the other, in one scope; `name` is for tracebacks."""
    for block in blocks:
        exec(compile(in_this_version(block), name, "exec"), scope)
