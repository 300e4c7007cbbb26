"""One row: its document is computed, stored and restored once, and each method answers on a copy of that.

Methods for documents stored alone (`Blend`) get the same tokens in parts, each computed, stored and restored by itself.

Times are seconds of the processor, of all threads of the process: with one thread those of an idle machine, whatever else runs.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

from cake_hf import CakeCache
from cake_hf.layers.compat import for_generate
from cake_hf.presses import Blend
from cake_hf.presses.cache import nbytes
from eval.data.encode import Encoder
from eval.data.prompts import Template
from eval.data.rows import Row
from eval.data.shorten import shortened
from eval.methods.contestants import Method
from eval.scores import score
from eval.tasks import Task

OTHER_QUESTION = "Zebra?"
PART = 256
"""Tokens of a part that is stored alone."""


def split_row(tokenizer: Any, task: Task, template: Template, row: Row, tokens: int) -> tuple[list[int], list[int]]:
    """Returns the token ids of a row: of the document and what stands before it, and of all that comes after.

    Args:
        tokenizer: of the model.
        task, template: of the row.
        row: with any document.
        tokens: of a longer document only as many are kept; see `shortened`.
    """
    row = replace(row, document=shortened(tokenizer, task, row, tokens))
    encoder = Encoder(tokenizer, limit=None)
    prompt = list(encoder.prompt(task, template, row).ids)
    other = encoder.prompt(task, template, replace(row, question=OTHER_QUESTION)).ids
    common = next(
        (place for place, pair in enumerate(zip(prompt, other, strict=False)) if pair[0] != pair[1]), len(prompt) - 1
    )
    return prompt[:common], prompt[common:]


@dataclass
class Times(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed for us
    """Notes when each token came, in seconds of the processor; stops after the first line if only that counts.

    Attributes:
        decode: turns new tokens into text; None not to stop.
        start: tokens of the prompt.
        tokens: the seconds.
    """

    decode: Callable[[torch.Tensor], str] | None
    start: int
    tokens: list[float] = field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens.append(time.process_time())
        stops = self.decode is not None and "\n" in self.decode(input_ids[0, self.start :]).lstrip("\n")
        return torch.full((input_ids.shape[0],), stops, dtype=torch.bool, device=input_ids.device)


def ask(
    model: Any, tokenizer: Any, task: Task, ids: torch.Tensor, cache: Any, most: int
) -> tuple[list[int], list[float]]:
    """Has a model answer, greedily; returns the tokens, and when each came, in seconds of the processor.

    Args:
        model, tokenizer: that answer.
        task: of the question.
        ids: of the prompt, `[1, tokens]`.
        cache: that may hold the start of the prompt.
        most: tokens of the answer, if the task has no smaller number.
    """
    times = Times(tokenizer.decode if task.first_line else None, ids.shape[1])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(most, task.new_tokens),
        do_sample=False,
        stopping_criteria=[times],
        pad_token_id=tokenizer.eos_token_id,
        **for_generate(model, cache),
    )
    return answer[0, ids.shape[1] :].tolist(), times.tokens


@dataclass(frozen=True)
class Runner:
    """Runs rows.

    Attributes:
        model, tokenizer: that answer.
        folder: for the store; emptied after each row.
        answer: the most tokens of an answer.
        methods: by name.
    """

    model: Any
    tokenizer: Any
    folder: Path
    answer: int
    methods: Mapping[str, Method]

    def run(
        self,
        task: Task,
        row: Row,
        document: list[int],
        question: list[int],
        methods: Sequence[str],
        *,
        measure: bool = True,
    ) -> Iterator[dict[str, Any]]:
        """Yields what came of each method; a document that is stored in parts is restored in as many seconds as these take.

        Args:
            task, row: of the question.
            document, question: token ids; see `split_row`.
            methods: that are missing.
            measure: also measure the error of attention.
        """
        ids = torch.tensor([document])
        parts = ids.split(PART, dim=1) if any(isinstance(self.methods[name], Blend) for name in methods) else ()
        store = str(self.folder / "kv")
        begun = time.process_time()
        with CakeCache(self.model, store) as cache:
            cache.prefill(ids)
            computed = time.process_time() - begun
        for part in parts:
            with CakeCache(self.model, store) as cache:
                cache.prefill(part)
        with ExitStack() as stack:
            whole, restored = self._restored(store, [ids], stack)
            alone, alone_restored = self._restored(store, parts, stack)
            for name in methods:
                method = self.methods[name]
                yield {
                    "task": task.name,
                    "row": row.id,
                    "method": name,
                    "tokens": len(document),
                    "question": len(question),
                    "compute_seconds": computed,
                    "restore_seconds": alone_restored if isinstance(method, Blend) else restored,
                    **self._answer(
                        task,
                        row,
                        alone if isinstance(method, Blend) else whole,
                        torch.tensor([document + question]),
                        method,
                        measure=measure,
                    ),
                }
        shutil.rmtree(store)

    def _restored(self, store: str, parts: Sequence[torch.Tensor], stack: ExitStack) -> tuple[list[CakeCache], float]:
        """Returns a cache for each part, and the seconds that loading them took; `stack` closes them."""
        begun, caches = time.process_time(), []
        for part in parts:
            cache = stack.enter_context(CakeCache(self.model, store, strategy="load", save=False))
            assert not cache.prefill(part).chunks_computed, "the restore found not all of its chunks"
            caches.append(cache)
        return caches, time.process_time() - begun

    def _answer(
        self, task: Task, row: Row, caches: list[CakeCache], ids: torch.Tensor, method: Method, *, measure: bool
    ) -> dict[str, Any]:
        used, found = self._pressed(caches, method, measure=measure)
        begun = time.process_time()
        answer, ticks = ask(self.model, self.tokenizer, task, ids, used, self.answer)
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        return {
            **found,
            "question_seconds": ticks[0] - begun,
            "token_seconds": (ticks[-1] - ticks[0]) / (len(ticks) - 1) if len(ticks) > 1 else None,
            "answer": text,
            "score": score(task, text, row.answers, row.classes),
        }

    def _pressed(self, caches: list[CakeCache], method: Method, *, measure: bool) -> tuple[Any, dict[str, Any]]:
        """Returns the cache that is asked, and what making it took and left."""
        if method is None:
            layers, _ = caches[0].copied_content()
            kept = nbytes(tensor for layer in layers for tensor in (layer.keys, layer.values))
            return copy.deepcopy(caches[0]), {"press_seconds": 0.0, "bytes": kept, "share": 1.0, "error": 0.0}
        given: Any = caches if isinstance(method, Blend) else caches[0]
        begun = time.process_time()
        used = method(self.model, given, measure=False)
        taken = time.process_time() - begun
        report = (method(self.model, given) if measure else used).report
        return used, {
            "press_seconds": taken,
            "bytes": report.bytes_after,
            "share": report.bytes_after / report.bytes_before,
            "error": report.error,
        }
