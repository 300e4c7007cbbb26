"""The course of the demonstration: cold, warm, the oracle, the race, and whether all of them agree."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cake_hf.assets import RECALL_TINY
from cake_hf.cache import CakeCache
from cake_hf.cli.console import console, progress_bar
from cake_hf.cli.models import (
    load_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
    read_text,
    refuse_too_long,
)
from cake_hf.errors import CakeError
from cake_hf.stores import open_store
from demo.asking import Answer, ask_plainly, ask_with_store, warm_up
from demo.pictures import show_race, show_task, show_verdict, show_warm
from demo.race import Race, run_race
from demo.task import Task, make_task
from demo.worker import Request, ask_in_fresh_process


@dataclass(frozen=True)
class DemoOptions:
    """The user's options.

    Attributes:
        model: a folder, or a name on the Hub; empty for recall-tiny, which comes with the package.
        file: the user's text; None for source files of the installed Python.
        question: about the text; empty to hide facts in it and ask for one.
        tokens: length of the text; None for 8192 of ours, or all of the user's.
        chunk_size: tokens.
        new_tokens: the most tokens to generate.
        repeats: rounds of the race.
        store: a directory that is kept; None for a temporary one.
        dtype, device: as `load_model` takes them.
    """

    model: str = ""
    file: Path | None = None
    question: str = ""
    tokens: int | None = None
    chunk_size: int = 512
    new_tokens: int = 8
    repeats: int = 3
    store: Path | None = None
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class Verdict:
    """Whether all runs agree with the oracle.

    Attributes:
        logits: the same bit for bit, in every run.
        answers: the same tokens, in every run.
    """

    logits: bool
    answers: bool

    @property
    def good(self) -> bool:
        """Whether both hold."""
        return self.logits and self.answers


def play(options: DemoOptions) -> Verdict:
    """Runs the demonstration and prints it as it goes.

    Raises:
        ValueError: the options, the model or the file cannot be used.
        CakeError: the model's prompts cannot be restored, or a process of the demonstration failed.
    """
    name = options.model or str(RECALL_TINY)
    with quiet_transformers():
        tokenizer = load_tokenizer(name)
        task = _make_task(options, tokenizer)
        longest = task.ids.shape[1] + options.new_tokens
        refuse_too_long(load_config(name), longest, "choose fewer --tokens.")
        show_task(task, options.model or "recall-tiny", options.chunk_size)
        with _store_folder(options.store) as store:
            cold, warm = _ask_twice(name, options, task, store)
            model = load_model(name, options.dtype, options.device)
            with console.status("transformers alone, to compare with"):
                warm_up(model, task.ids, options.chunk_size)
                oracle = ask_plainly(model, task.ids, options.new_tokens, options.chunk_size)
            show_warm(task, tokenizer, oracle, cold, warm)
            race = _race(model, task, store, options)
        show_race(race)
    verdict = judge(oracle, [cold, warm], race)
    show_verdict(verdict.logits, verdict.answers)
    return verdict


def judge(oracle: Answer, answers: list[Answer], race: Race) -> Verdict:
    """Compares every run with the oracle; those of the race stop after one token."""
    first = Answer(oracle.tokens[:1], oracle.logits[:1], oracle.ttft)
    pairs = [(oracle, answer) for answer in answers] + [(first, answer) for answer in race.answers]
    return Verdict(
        logits=all(right.same_logits(answer) for right, answer in pairs),
        answers=all(torch.equal(right.tokens, answer.tokens) for right, answer in pairs),
    )


def _make_task(options: DemoOptions, tokenizer: Any) -> Task:
    if options.question and options.file is None:
        raise ValueError("A --question needs the text that it is about; give it with --file.")
    text = read_text(options.file) if options.file else None
    tokens = options.tokens or (8192 if text is None else None)
    task = make_task(tokenizer, text, options.question, tokens)
    if task.ids.shape[1] <= 2 * options.chunk_size:
        raise ValueError(
            f"The prompt has {task.ids.shape[1]:,} tokens, which is not more than two chunks of {options.chunk_size}; "
            "give a longer text or a smaller --chunk-size."
        )
    return task


def _ask_twice(name: str, options: DemoOptions, task: Task, store: Path) -> tuple[Answer, Answer]:
    """Asks cold and warm, in two processes; before this process loads the model, so that they have the GPU to themselves."""
    cold_request = Request(
        model=name,
        dtype=options.dtype,
        device=options.device,
        store=str(store),
        chunk_size=options.chunk_size,
        new_tokens=options.new_tokens,
        strategy="compute",
        threads=torch.get_num_threads(),
    )
    with tempfile.TemporaryDirectory(prefix="cake-demo-") as folder:
        with console.status("a fresh process computes the prompt and saves its KV"):
            cold = ask_in_fresh_process(cold_request, task.ids, Path(folder, "cold"))
        with console.status("another fresh process finds it in the store"):
            warm = ask_in_fresh_process(replace(cold_request, strategy="both"), task.ids, Path(folder, "warm"))
    refuse_unrestored(cold, warm)
    return cold, warm


def refuse_unrestored(cold: Answer, warm: Answer) -> None:
    """Raises an error if the store has not kept the chunks, since nothing can be shown then.

    Raises:
        CakeError: it has not.
    """
    if cold.report.chunks_unsaved:
        raise CakeError(f"{cold.report.chunks_unsaved} chunks could not be saved; is the disk full?")
    report = warm.report
    if not report.chunks_loaded and (report.chunks_missed or report.chunks_failed or report.reason):
        raise CakeError(f"The second process could not load anything: {report.reason or 'the store failed'}.")


def _race(model: Any, task: Task, store: Path, options: DemoOptions) -> Race:
    with progress_bar("the race", "runs") as progress, open_store(store) as opened:
        # The warm process may have loaded little: it also computes, and on some machines that is faster.
        loading = CakeCache(model, opened, chunk_size=options.chunk_size, strategy="load", save=False)
        report = ask_with_store(model, task.ids, 1, loading).report
        if not report.chunks_loaded:
            raise CakeError(f"The race could not be run: {report.reason or 'the store failed'}.")
        chunk_bytes = report.bytes_loaded / report.chunks_loaded
        return run_race(model, task.ids, opened, options.chunk_size, chunk_bytes, options.repeats, progress)


@contextmanager
def _store_folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="cake-demo-store-") as folder:
        yield Path(folder)
