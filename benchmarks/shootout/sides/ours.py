"""Ours: a `CakeCache` on a directory."""

from __future__ import annotations

from typing import Any

from benchmarks.shootout.questions import BLOCK, MEMORY, Answer, Options, Question, System


class Ours:
    """For each question a new cache, on the directory or on one store in memory."""

    def __init__(self, options: Options) -> None:
        import torch

        from cake_hf.cli.models import load_model

        torch.set_num_threads(options.threads)
        self._options = options
        self._model: Any = load_model(options.model, options.dtype, "cpu")
        if options.adapter:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, options.adapter).eval()
        self._store: Any = options.folder
        if options.role == MEMORY:
            from cake_hf import MemoryStore

            self._store = MemoryStore()

    def ask(self, question: Question) -> Answer:
        """Generates with the cache, or as transformers does alone.

        Alone means one forward in float32. In bfloat16 it means transformers' own chunks, since one forward rounds differently.
        """
        import torch

        from cake_hf import CakeCache
        from cake_hf.layers.compat import plain_cache
        from demo.asking import ask

        ids = torch.tensor([question.ids])
        if not question.reuse:
            pieces: dict[str, Any] = {} if self._options.dtype == "float32" else {"prefill_chunk_size": BLOCK}
            answer = ask(self._model, ids, plain_cache(self._model), question.new, **pieces)
            return Answer(answer.tokens.tolist(), answer.ttft, 0)
        with CakeCache(self._model, self._store, chunk_size=BLOCK, salt=self._options.tenant) as cache:
            answer = ask(self._model, ids, cache, question.new)
            cache.flush()
        return Answer(answer.tokens.tolist(), answer.ttft, answer.report.chunks_loaded * BLOCK)

    def close(self) -> None:
        """Does nothing: each cache was closed with its question."""


def make(options: Options) -> System:
    """Returns the system."""
    return Ours(options)
