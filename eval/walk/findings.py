"""Turns measurements into a result: medians, ratios against the goals, and answers that differ."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.figures import Figure, Goal
from benchmarks.timing import Sample
from eval.walk.course import Walked
from eval.walk.taken import Taken
from eval.walk.ways import CHUNKED, COLD, COPIED, NEW, OURS, RECIPE, SINGLE, TORCH_LOAD

Reading = Callable[[Taken], float]

GOALS: dict[str, tuple[str, str, str, Reading, Goal | None]] = {
    "question": (
        "question, same process: DynamicCache",
        *(COPIED, RECIPE),
        lambda taken: taken.question_seconds,
        Goal(1.1),
    ),
    "question_answer": (
        "the same, to the last token",
        *(COPIED, RECIPE),
        lambda taken: taken.answered,
        None,
    ),
    "new_process": (
        "document and question, new process: torch.load",
        *(NEW, TORCH_LOAD),
        lambda taken: taken.first_token,
        Goal(1.1),
    ),
    "cold_over_chunked": (
        "first time, with saving: generate, in chunks",
        *(COLD, CHUNKED),
        lambda taken: taken.first_token,
        Goal(1.03),
    ),
    "cold_over_single": (
        "first time, with saving: generate",
        *(COLD, SINGLE),
        lambda taken: taken.first_token,
        Goal(1.05),
    ),
}
"""Name -> its meaning, the two ways that are compared, by what, and its goal."""


def result_of(walked: Walked) -> dict[str, Any]:
    """Returns the result for one document, JSON-ready."""
    return {
        "document": walked.document.name,
        "tokens": walked.tokens,
        "rounds": walked.rounds,
        "questions": [
            {"tokens": prompt.shape[1] - walked.tokens, "text": text}
            for text, prompt in zip(walked.document.questions, walked.document.prompts, strict=True)
        ],
        "on_disk": walked.on_disk,
        "save_seconds": [round(seconds, 4) for seconds in walked.save_seconds],
        "goals": {name: figure.as_dict() for name, figure in ratios(walked.taken).items()},
        "expected": [plain(taken) for taken in walked.expected],
        "taken": [plain(taken) for taken in walked.taken],
    }


def plain(taken: Taken) -> dict[str, Any]:
    """Returns JSON-ready values; the digests of all steps, which only mean something beside others, as one."""
    return taken.as_dict() | {"digests": hashlib.sha256("".join(taken.digests).encode()).hexdigest()[:16]}


def ratios(taken: Sequence[Taken]) -> dict[str, Figure]:
    """Returns each goal's figure: the median of the ratios of neighbouring runs."""
    found = {}
    for name, (label, above, below, reading, goal) in GOALS.items():
        found[name] = Figure.ratio(label, _sample(taken, above, reading), _sample(taken, below, reading), goal)
    return found


def _sample(taken: Sequence[Taken], way: str, reading: Reading) -> Sample:
    found = {(one.round, one.question): reading(one) for one in taken if one.way == way}
    return Sample(tuple(found[key] for key in sorted(found)))


def broken(walked: Walked, dtype: str) -> list[str]:
    """Returns a sentence for each way with wrong answers; none if all are right.

    Ours must equal, bit for bit, a `DynamicCache` that was filled in the same pieces. In float32 the tokens of all ways must
    be those of `generate`; in lower precision a near tie may fall the other way, in every library.
    """
    found = dict.fromkeys(_unlike(walked))
    if dtype == "float32":
        found |= dict.fromkeys(_other_tokens(walked))
    return list(found)


def _unlike(walked: Walked) -> Iterator[str]:
    for taken in walked.taken:
        if taken.way in OURS and taken.digests != walked.expected[taken.question].digests:
            yield f"{walked.tokens:,} tokens, {taken.way}, question {taken.question + 1}: other bits than in the same pieces"


def _other_tokens(walked: Walked) -> Iterator[str]:
    """Returns the ways with other tokens. `generate` gets the first question only; for the second, the recipe stands in for
    it."""
    first = {(taken.way, taken.question): taken.tokens for taken in reversed(walked.taken)}
    for taken in walked.taken:
        reference = SINGLE if taken.question == 0 else RECIPE
        if taken.tokens != first[reference, taken.question]:
            where = f"{walked.tokens:,} tokens, {taken.way}, question {taken.question + 1}"
            yield f"{where}: other tokens than {reference} has"
