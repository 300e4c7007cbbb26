"""The ways to run a prompt, all of which must give the same. `Runner` has one model and runs any prompt in any way."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import DynamicCache

from cake_hf import reads_only
from cake_hf.cache import CakeCache
from cake_hf.limits import Limits
from cake_hf.stores import Store
from cake_hf.stores.base import Part
from cake_hf.testing import FaultStore, GateStore, WrapperStore, expected_faults
from demo.asking import Answer, ask, warm_up
from eval.config import RunConfig
from eval.data.encode import Prompt
from eval.outcomes import Outcome, digests, margins
from eval.tasks import TASKS

JOIN_SECONDS = 60.0


@dataclass(frozen=True)
class Runner:
    """Runs prompts with one model against one store.

    Attributes:
        config: of the run.
        model, tokenizer: loaded.
        store: the run's.
        salt: keeps this run's chunks apart from all others', so that a cold run is cold.
    """

    config: RunConfig
    model: Any
    tokenizer: Any
    store: Store
    salt: str

    def start_up(self, prompt: Prompt) -> None:
        """Starts the libraries up with another prompt, so that no first token includes that."""
        if len(prompt.ids) > 1:
            warm_up(self.model, torch.tensor([prompt.ids]), self.config.chunk_size)

    def run(self, mode: str, prompt: Prompt) -> Outcome:
        """Runs one mode of `config.MODES`. An error becomes part of the outcome, and the other rows go on."""
        ways: dict[str, Callable[[Prompt], tuple[Answer, str]]] = {
            "plain": self._plain,
            "chunked": self._chunked,
            "cold": self._cold,
            "warm": self._warm,
            "middle": self._middle,
            "faults": self._faults,
        }
        try:
            answer, note = ways[mode](prompt)
        except Exception as error:
            return Outcome(prompt.task, prompt.row, mode, error=f"{type(error).__name__}: {error}")
        report = answer.report
        return Outcome(
            *(prompt.task, prompt.row, mode),
            tokens=answer.tokens.tolist(),
            digests=digests(answer),
            margins=margins(answer),
            text=str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True)),
            ttft=answer.ttft,
            prompt_tokens=len(prompt.ids),
            cut=prompt.cut,
            loaded=report.chunks_loaded,
            computed=report.chunks_computed,
            missed=report.chunks_missed,
            failed=report.chunks_failed,
            unsaved=report.chunks_unsaved,
            note=note
            or report.reason * (mode != "cold" or not report.chunks_computed),  # a cold run has nothing to load
        )

    def _plain(self, prompt: Prompt) -> tuple[Answer, str]:
        return self._ask(prompt, DynamicCache(config=self.model.config)), ""

    def _chunked(self, prompt: Prompt) -> tuple[Answer, str]:
        cache = DynamicCache(config=self.model.config)
        return self._ask(prompt, cache, prefill_chunk_size=self.config.chunk_size), ""

    def _cold(self, prompt: Prompt) -> tuple[Answer, str]:
        return self._restored(prompt, self.store, save=True), ""

    def _warm(self, prompt: Prompt) -> tuple[Answer, str]:
        return self._restored(prompt, self.store), ""

    def _middle(self, prompt: Prompt) -> tuple[Answer, str]:
        chunks = (len(prompt.ids) - 1) // self.config.chunk_size
        if chunks < 2:
            return self._warm(prompt)[0], f"{chunks} full chunks have no middle to meet in"
        gate = MeetingStore(self.store, chunks, chunks // 2)
        with gate.forcing(self.model):
            # One loader: a second one would hold the chunk before the meeting point.
            answer = self._restored(prompt, gate, loader_threads=1)
        met = (answer.report.chunks_computed, answer.report.chunks_loaded) == (gate.meeting, chunks - gate.meeting)
        return answer, "" if met else answer.report.reason or "the two sides did not meet in the middle"

    def _faults(self, prompt: Prompt) -> tuple[Answer, str]:
        if self.config.sabotage:
            with checksum_off():
                return self._restored(prompt, FlippingStore(self.store), strategy="load"), "sabotaged"
        seed = zlib.crc32(f"{self.config.seed}/{prompt.task}/{prompt.row}".encode())
        with expected_faults():
            # All chunks are read, so that the seed alone decides how much goes wrong.
            faulty = FaultStore(self.store, rate=self.config.fault_rate, seed=seed)
            return self._restored(prompt, faulty, strategy="load"), ""

    def _restored(
        self, prompt: Prompt, store: Store, *, save: bool = False, loader_threads: int = 2, strategy: str = "both"
    ) -> Answer:
        queue = int(self.config.save_queue_gib * 2**30)
        limits = Limits(loader_threads=loader_threads, save_queue_bytes=queue)
        cache = CakeCache(
            self.model,
            store,
            chunk_size=self.config.chunk_size,
            salt=self.salt,
            save=save,
            strategy=strategy,
            limits=limits,
        )
        with cache:
            answer = self._ask(prompt, cache)
            cache.flush()
        return answer

    def _ask(self, prompt: Prompt, cache: Any, **options: Any) -> Answer:
        least = self.config.min_new_tokens
        if TASKS[prompt.task].stop_at_newline:
            options["eos_token_id"] = self._line_ends()
            least = max(1, least)
        if least:
            options["min_new_tokens"] = min(least, prompt.new_tokens)
        return ask(self.model, torch.tensor([prompt.ids]), cache, prompt.new_tokens, **options)

    def _line_ends(self) -> list[int]:
        known = self.model.generation_config.eos_token_id
        ends = [] if known is None else [known] if isinstance(known, int) else list(known)
        return [*ends, self.tokenizer("\n", add_special_tokens=False).input_ids[-1]]


class MeetingStore(GateStore):
    """A store that lets the two ends meet at one chunk, whatever computing and loading cost.

    While chunk `meeting - 1` is being computed, the gate opens for all later chunks, and the forward goes on only when the
    one loader has settled them: its next read, a contested one of that chunk, has then reached the gate, where it waits until
    all is over.

    Args:
        inner: the store with the chunks.
        chunks: of the prompt.
        meeting: how many of them are to be computed, at least 1.
    """

    def __init__(self, inner: Store, chunks: int, meeting: int) -> None:
        super().__init__(inner)
        self.chunks, self.meeting = chunks, meeting
        self._complete: bool | None = None  # unknown until the restore has asked
        self._forwards = 0

    def contains(self, keys: Sequence[str]) -> list[bool]:
        mask = super().contains(keys)
        self._complete = len(mask) >= self.chunks and all(mask[: self.chunks])
        return mask

    @contextmanager
    def forcing(self, model: Any) -> Iterator[None]:
        """Lets the model's forwards open the gate in the body. If chunks are missing, nothing is forced."""
        handle = model.register_forward_pre_hook(reads_only(self._before_forward), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self.open()
            for thread in threading.enumerate():
                if thread.name.startswith("cake-load"):
                    thread.join(JOIN_SECONDS)

    def _before_forward(self, module: Any, arguments: Any, options: Any) -> None:
        if self._complete is None:
            return  # the call with the prompt
        self._forwards += 1
        if not self._complete:
            self.open()
        elif self._forwards == self.meeting:
            self.open(self.chunks - self.meeting)
            self.await_begun(self.chunks - self.meeting + 1)


class FlippingStore(WrapperStore):
    """A store that flips a high bit of every payload that is read: shows that the harness notices."""

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        size = self.inner.read_into(key, parts)
        _flip(parts)
        return size

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        found = self.inner.read_range(key, parts, offset)
        _flip(parts)
        return found


class RecordingStore(WrapperStore):
    """Reports each key that is written through it, so that it can be deleted again."""

    def __init__(self, inner: Store, note: Callable[[str], None]) -> None:
        super().__init__(inner)
        self._note = note

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        self._note(key)  # before: a process killed in between must not leave a chunk that is recorded nowhere
        return self.inner.write(key, parts, replace=replace)


@contextmanager
def checksum_off() -> Iterator[None]:
    """Skips the payloads' checksums in the body."""
    with mock.patch("cake_hf.chunks.codec.checksum", return_value=_Anything()):
        yield


class _Anything(str):
    """A checksum that is equal to every other."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def _flip(parts: Sequence[memoryview]) -> None:
    """Flips bit 6 of the fourth byte: the top of an exponent in float32, and in the second value of two-byte types."""
    parts[-1][3] ^= 0x40
