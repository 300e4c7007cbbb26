"""transformers alone: a `DynamicCache` that was run over the document, copied for each question; torch.save keeps it."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

from benchmarks.shootout.questions import DISK, Answer, Options, Question, System


class Recipe:
    """The recipe of transformers' documentation; the file's name is chosen by us: a digest of the document's tokens."""

    def __init__(self, options: Options) -> None:
        import torch

        from cake_hf.cli.models import load_model
        from cake_hf.layers.compat import cache_name, forward_of

        torch.set_num_threads(options.threads)
        self._options = options
        self._model: Any = load_model(options.model, options.dtype, "cpu")
        self._name = cache_name(forward_of(self._model))  # a model with adapters does not name its arguments
        if options.adapter:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, options.adapter).eval()
        self._held: dict[str, Any] = {}

    def ask(self, question: Question) -> Answer:
        """Generates behind a copy of the document's cache, or without one."""
        import torch

        from cake_hf.layers.compat import plain_cache
        from demo.asking import ask

        begin, loaded = time.monotonic(), 0
        if question.reuse:
            cache, loaded = self._document(question)
            cache = copy.deepcopy(cache)
        else:
            cache = plain_cache(self._model)
        before = time.monotonic() - begin
        answer = ask(self._model, torch.tensor([question.ids]), cache, question.new)
        return Answer(answer.tokens.tolist(), before + answer.ttft, loaded)

    def _document(self, question: Question) -> tuple[Any, int]:
        import torch

        file = self._options.folder / f"{question.name}.pt"
        if self._options.role != DISK and file.name in self._held:
            return self._held[file.name], question.document
        if self._options.role == DISK and file.exists():
            return torch.load(file, weights_only=False), question.document
        self._held = {file.name: self._compute(question, file)}
        return self._held[file.name], 0

    def _compute(self, question: Question, file: Path) -> Any:
        import torch

        from cake_hf.layers.compat import plain_cache

        cache = plain_cache(self._model)
        ids = torch.tensor([question.ids[: question.document]])
        with torch.inference_mode():
            self._model(ids, logits_to_keep=1, **{self._name: cache})
        if self._options.role == DISK:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(cache, file)
        return cache

    def close(self) -> None:
        """Does nothing: torch.save has returned."""


def make(options: Options) -> System:
    """Returns the system."""
    return Recipe(options)
