"""kvboost: its engine around a transformers model in the wanted dtype.

It writes to its directory only what its memory evicts, so the process that is to use the disk has memory for one chunk:
all but the last one are then on the disk. With its usual budget, nothing of one document reaches it.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.shootout.questions import BLOCK, DISK, Answer, Options, Question, System

USUAL_BYTES = 2 << 30


class KVBoostSide:
    """For each question a new engine on the directory; in memory, one engine that stays."""

    def __init__(self, options: Options) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(options.threads)
        self._options = options
        self._tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
        if options.adapter:
            from peft import PeftModel  # in its environment

            model = PeftModel.from_pretrained(model, options.adapter).merge_and_unload().eval()
        self._model = model
        self._kept: Any = None

    def ask(self, question: Question) -> Answer:
        """Generates in its usual mode, or in the one it calls baseline."""
        from kvboost.engine import GenerationMode  # type: ignore[import-not-found]  # it is in the other environment

        begin, first, tokens = time.perf_counter(), 0.0, []

        def came(token: int) -> None:
            nonlocal first
            first = first or time.perf_counter() - begin
            tokens.append(int(token))

        result = self._engine().generate(
            question.text,
            max_new_tokens=question.new,
            mode=GenerationMode.CHUNK_KV_REUSE if question.reuse else GenerationMode.BASELINE,
            do_sample=False,
            cacheable_prefix_len=question.document,
            on_token=came,
        )
        return Answer(tokens, first, int(result.cached_tokens))

    def _engine(self) -> Any:
        from kvboost import KVBoost  # type: ignore[import-not-found]

        if self._kept is not None:
            return self._kept
        disk = self._options.role == DISK
        text = self._model.config
        heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        chunk = 2 * BLOCK * heads * width * text.num_hidden_layers * self._model.dtype.itemsize
        engine = KVBoost(
            self._model,
            self._tokenizer,
            max_cache_bytes=chunk if disk else USUAL_BYTES,
            chunk_size=BLOCK,
            device="cpu",
            **({"disk_cache_dir": self._options.store, "recency_window_chunks": 0} if disk else {}),
        )
        if not disk:
            self._kept = engine
        return engine

    def close(self) -> None:
        """Does nothing: it has no call for that."""


def make(options: Options) -> System:
    """Returns the system."""
    return KVBoostSide(options)
