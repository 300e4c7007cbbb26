"""The whole walk over one document: all ways take turns, round by round."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.workbench import cheap_collections
from demo.asking import warm_up
from eval.walk.documents import Document
from eval.walk.fresh import Request, ask_in_new_process
from eval.walk.taken import Asker, Clock, Prepared, Taken
from eval.walk.ways import CHUNKED, COLD, COPIED, DIRECT, NEW, PIECES, RECIPE, SINGLE, TORCH_LOAD, Ways

T = TypeVar("T")


@dataclass
class Walked:
    """The results for one document.

    Attributes:
        document: the document.
        taken: of all ways, in the order of the run.
        expected: the questions on a `DynamicCache` that was filled in the pieces of ours.
        on_disk: bytes, by way: the file of `torch.save`, the store.
        save_seconds: of `torch.save`, in each round.
    """

    document: Document
    taken: list[Taken] = field(default_factory=list)
    expected: list[Taken] = field(default_factory=list)
    on_disk: dict[str, int] = field(default_factory=dict)
    save_seconds: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the document."""
        return self.document.ids.shape[1]

    @property
    def rounds(self) -> int:
        """The number of rounds so far."""
        return len(self.save_seconds)


@dataclass(frozen=True)
class Course:
    """The model, and how it is asked.

    Attributes:
        name: of the model, by which other processes find it.
        model, tokenizer: loaded.
        dtype: of the weights.
        tokens: of each answer.
        chunk_size: of our caches.
        rounds: their number.
    """

    name: str
    model: Any
    tokenizer: Any
    dtype: str
    tokens: int
    chunk_size: int
    rounds: int

    def walk(self, walked: Walked, tell: Callable[[str], object], done: Callable[[], object]) -> None:
        """Runs all ways, round by round.

        Args:
            walked: a new one, which collects the results.
            tell: called with lines of progress.
            done: called after each round.
        """
        ways = self._ways(walked.document, 0)
        warm_up(self.model, walked.document.ids, self.chunk_size)
        tell(f"{walked.tokens:,} tokens: what answers must equal")
        pieces = ways.pieces()
        walked.expected = [ways.copied(PIECES, which, pieces) for which in range(len(walked.document.questions))]
        del pieces
        for number in range(self.rounds):
            begin = time.monotonic()
            with (
                tempfile.TemporaryDirectory(prefix="cake-walk-", ignore_cleanup_errors=True) as folder,
                cheap_collections(),
            ):
                Round(self, self._ways(walked.document, number), walked, number, Path(folder)).run()
            tell(f"{walked.tokens:,} tokens: round {number + 1} of {self.rounds} took {time.monotonic() - begin:.0f} s")
            done()

    def _ways(self, document: Document, number: int) -> Ways:
        tokens = document.ids.shape[1]
        asker = Asker(self.model, self.tokenizer, document.prompts, tokens, self.tokens, number)
        return Ways(asker, document.ids, self.chunk_size)


@dataclass(frozen=True)
class Round:
    """Runs each way once. Ways that are compared run one after the other, and each round begins with another one.

    Attributes:
        course: the one that this is a round of.
        ways: with this round's number.
        walked: collects the results.
        number: of the round.
        folder: empty; for store and file.
    """

    course: Course
    ways: Ways
    walked: Walked
    number: int
    folder: Path

    def run(self) -> None:
        """Runs the whole round."""
        recipe = self._first_times()
        self._save(recipe)
        restored = self.ways.restored(self._store)
        try:
            self._questions(recipe, restored)
        finally:
            restored.cache.close()
        del recipe, restored
        self.walked.on_disk[NEW] = sum(file.stat().st_size for file in self._store.rglob("*") if file.is_file())
        for way in turned((TORCH_LOAD, NEW), self.number):
            self.walked.taken.append(self._in_new_process(way))

    @property
    def _store(self) -> Path:
        return self.folder / "store"

    @property
    def _file(self) -> Path:
        return self.folder / "document.pt"

    def _first_times(self) -> Prepared:
        recipe: list[Prepared] = []
        arms: dict[str, Callable[[], None]] = {
            SINGLE: lambda: self.walked.taken.append(self.ways.single()),
            CHUNKED: lambda: self.walked.taken.append(self.ways.chunked()),
            COLD: lambda: self.walked.taken.append(self.ways.cold(self._store)),
            RECIPE: lambda: recipe.append(self.ways.recipe()),
        }
        for name in turned(tuple(arms), self.number):
            arms[name]()
        return recipe[0]

    def _save(self, recipe: Prepared) -> None:
        clock = Clock()
        clock.take(TORCH_LOAD, lambda: torch.save(recipe.cache, self._file))
        self.walked.save_seconds.append(clock.laps[TORCH_LOAD])
        self.walked.on_disk[TORCH_LOAD] = self._file.stat().st_size

    def _questions(self, recipe: Prepared, restored: Prepared) -> None:
        """Asks on both caches, in turns; the time to prepare them is told with the first question."""
        for question in range(len(self.walked.document.questions)):
            both = ((RECIPE, recipe), (COPIED, restored))
            for way, prepared in turned(both, self.number + question):
                told = prepared if question == 0 else replace(prepared, clock=Clock())
                self.walked.taken.append(self.ways.copied(way, question, told))
        self.walked.taken.append(self.ways.used_up(DIRECT, 0, restored))

    def _in_new_process(self, way: str) -> Taken:
        course, document = self.course, self.walked.document
        return ask_in_new_process(
            Request(
                model=course.name,
                dtype=course.dtype,
                threads=torch.get_num_threads(),
                way=way,
                place=str(self._store if way == NEW else self._file),
                ids=document.ids[0].tolist(),
                prompt=document.prompts[0][0].tolist(),
                tokens=course.tokens,
                round=self.number,
            )
        )


def turned(things: Sequence[T], number: int) -> list[T]:
    """Returns the same items, starting with another one each time."""
    at = number % len(things)
    return [*things[at:], *things[:at]]
