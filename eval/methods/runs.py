"""One row: its document is computed, stored and restored once, and each method answers on a copy of that.

Times are seconds of the processor, of all threads of the process: with one thread those of an idle machine, whatever else runs.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

from cake_hf import CakeCache
from cake_hf.layers.compat import for_generate
from cake_hf.presses import Press
from cake_hf.presses.cache import nbytes
from eval.data.encode import Encoder
from eval.data.prompts import Template
from eval.data.rows import Row
from eval.scores import score
from eval.tasks import Task

OTHER_QUESTION = "Zebra?"


def split_row(tokenizer: Any, task: Task, template: Template, row: Row, tokens: int) -> tuple[list[int], list[int]]:
    """Returns the token ids of a row: of the document and what stands before it, and of all that comes after.

    Args:
        tokenizer: of the model.
        task, template: of the row.
        row: with any document.
        tokens: a longer document loses its middle, as in LongBench.
    """
    ids = tokenizer(row.document, add_special_tokens=False, verbose=False).input_ids
    if len(ids) > tokens:
        ends = (ids[: tokens // 2], ids[len(ids) - tokens // 2 :])
        row = replace(row, document="".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends))
    encoder = Encoder(tokenizer, limit=None)
    prompt = list(encoder.prompt(task, template, row).ids)
    other = encoder.prompt(task, template, replace(row, question=OTHER_QUESTION)).ids
    common = next(
        (place for place, pair in enumerate(zip(prompt, other, strict=False)) if pair[0] != pair[1]), len(prompt) - 1
    )
    return prompt[:common], prompt[common:]


@dataclass
class Times(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed for us
    """Notes when each token came, in seconds of the processor; stops nothing."""

    tokens: list[float] = field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens.append(time.process_time())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Runner:
    """Runs rows.

    Attributes:
        model, tokenizer: that answer.
        folder: for the store; emptied after each row.
        answer: the most tokens of an answer.
        methods: by name; None is the full KV.
    """

    model: Any
    tokenizer: Any
    folder: Path
    answer: int
    methods: Mapping[str, Press | None]

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
        """Yields what came of each method.

        Args:
            task, row: of the question.
            document, question: token ids; see `split_row`.
            methods: that are missing.
            measure: also measure the error of attention.
        """
        ids = torch.tensor([document])
        store = self.folder / "kv"
        begun = time.process_time()
        with CakeCache(self.model, str(store)) as cache:
            cache.prefill(ids)
            computed = time.process_time() - begun
        begun = time.process_time()
        with CakeCache(self.model, str(store), strategy="load", save=False) as cache:
            report = cache.prefill(ids)
            restored = time.process_time() - begun
            assert not report.chunks_computed, "the restore found not all of its chunks"
            for name in methods:
                yield {
                    "task": task.name,
                    "row": row.id,
                    "method": name,
                    "tokens": len(document),
                    "question": len(question),
                    "compute_seconds": computed,
                    "restore_seconds": restored,
                    **self._answer(
                        task, row, cache, torch.tensor([document + question]), self.methods[name], measure=measure
                    ),
                }
        shutil.rmtree(store)

    def _answer(
        self, task: Task, row: Row, cache: CakeCache, ids: torch.Tensor, press: Press | None, *, measure: bool
    ) -> dict[str, Any]:
        if press is None:
            used: Any = copy.deepcopy(cache)
            layers, _ = cache.copied_content()
            kept = nbytes(tensor for layer in layers for tensor in (layer.keys, layer.values))
            found: dict[str, Any] = {"press_seconds": 0.0, "bytes": kept, "share": 1.0, "error": 0.0}
        else:
            begun = time.process_time()
            used = press(self.model, cache, measure=False)
            taken = time.process_time() - begun
            report = (press(self.model, cache) if measure else used).report
            found = {
                "press_seconds": taken,
                "bytes": report.bytes_after,
                "share": report.bytes_after / report.bytes_before,
                "error": report.error,
            }
        times, begun = Times(), time.process_time()
        new = min(self.answer, task.new_tokens)
        answer = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            stopping_criteria=[times],
            pad_token_id=self.tokenizer.eos_token_id,
            **for_generate(self.model, used),
        )
        text = self.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        ticks = times.tokens
        return {
            **found,
            "question_seconds": ticks[0] - begun,
            "token_seconds": (ticks[-1] - ticks[0]) / (len(ticks) - 1) if len(ticks) > 1 else None,
            "answer": text,
            "score": score(task, text, row.answers, row.classes),
        }
