"""`python -m eval.parity`: does a restored prompt give exactly the plain result? Every row is run in every mode.

    plain     generate, as it comes
    chunked   generate(prefill_chunk_size=C) on a DynamicCache: the reference
    cold      CakeCache on a store without the row (rows that share a document find what was stored for the first)
    warm      CakeCache in a fresh process
    middle    computing and loading are made to meet in the middle
    faults    a seeded share of the reads is lost, cut off, flipped or fails

Exit code 1 if exactness is broken, 2 if nothing could be run. A run called again with the same settings continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cake_hf.cache import CakeCache
from cake_hf.cli.console import FAILED, WRONG, console, errors, progress_bar
from cake_hf.cli.models import quiet_transformers
from cake_hf.errors import CakeError
from cake_hf.stores import MemoryStore, open_store
from eval.compare import ORACLES, Metrics
from eval.config import RunConfig, add_options, make_config, read_config
from eval.data.encode import Prompt
from eval.judge import judge
from eval.loading import load
from eval.modes import RecordingStore, Runner
from eval.outcomes import Outcome
from eval.page import make_page
from eval.runs import RunBusy, RunFolder, describe_environment
from eval.tables import print_results
from eval.work import Work, find_work
from eval.worker import Request, run_in_fresh_process

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Run:
    """One run under way."""

    config: RunConfig
    folder: RunFolder
    runner: Runner
    work: Work
    progress: Progress

    def go(self) -> None:
        """Runs whatever has no outcome yet, batch by batch."""
        self._tell()
        self._clean_up()  # after an earlier process that was killed: a cold run must be cold
        due = [batch for batch in self.work.batches(self.config.batch_tokens) if any(map(self._has_due, batch))]
        if due:
            self.runner.start_up(max(due[0], key=lambda prompt: len(prompt.ids)))
        for batch in due:
            self._run_batch(batch)
            self._clean_up()

    def _clean_up(self) -> None:
        if not self.config.keep_chunks and (left := self.folder.remove_chunks(self.runner.store)):
            errors.print(
                f"{len(left)} chunks cannot be removed from the store; chunks.txt in {self.folder.path} lists them."
            )

    def _run_batch(self, batch: Sequence[Prompt]) -> None:
        for prompt in batch:
            for mode in self._modes("plain", "chunked", "cold"):
                self._run(mode, prompt)
        for mode in self._modes("warm"):
            waiting = [prompt for prompt in batch if self._is_due(mode, prompt)]
            if waiting:
                request = Request(self.config, self.folder.salt, torch.get_num_threads(), mode, waiting)
                for outcome in run_in_fresh_process(request):
                    self._keep(outcome)
        for prompt in batch:
            for mode in self._modes("middle", "faults"):
                self._run(mode, prompt)

    def _modes(self, *names: str) -> list[str]:
        return [name for name in names if name in self.config.modes]

    def _run(self, mode: str, prompt: Prompt) -> None:
        if self._is_due(mode, prompt):
            self._keep(self.runner.run(mode, prompt))

    def _is_due(self, mode: str, prompt: Prompt) -> bool:
        """Whether there is no outcome yet, and the oracles have not failed already."""
        outcomes = self.folder.outcomes
        done = (prompt.task, prompt.row, mode) in outcomes
        oracles = [outcomes.get((prompt.task, prompt.row, oracle)) for oracle in ORACLES]
        return not done and not any(oracle is not None and oracle.error for oracle in oracles)

    def _has_due(self, prompt: Prompt) -> bool:
        return any(self._is_due(mode, prompt) for mode in self.config.modes)

    def _keep(self, outcome: Outcome) -> None:
        self.folder.add(outcome)
        self._tell()

    def _tell(self) -> None:
        self.progress(len(self.folder.outcomes), len(self.work.prompts) * len(self.config.modes))


def run_parity(config: RunConfig, *, fresh: bool = False) -> tuple[Metrics, Path]:
    """Starts or continues the run of a config.

    Returns:
        (what came of it, the run's folder).

    Raises:
        BrokenConfig, BrokenPrompts, MissingData, RunBusy, CakeError, ValueError: it cannot be run; the message says what to do.
    """
    config.check_complete()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with quiet_transformers():
        with console.status("loading the model"):
            model, tokenizer = load(config)
            work = find_work(config, model, tokenizer)
            environment = describe_environment(model)
        with RunFolder(config, environment, fresh=fresh) as folder, open_store(config.store) as opened:
            if folder.restarted:
                errors.print("The machine, a library or the weights changed since this run began; it starts over.")
            if isinstance(opened, MemoryStore) and "warm" in config.modes:
                raise ValueError("Another process cannot see a store in memory; give --store a directory.")
            CakeCache(model, opened, chunk_size=config.chunk_size).close()  # a useless model or store is refused here
            store = RecordingStore(opened, folder.note_chunk)
            with progress_bar("parity", "runs") as progress:
                Run(config, folder, Runner(config, model, tokenizer, store, folder.salt), work, progress).go()
            metrics = judge(config, folder, work, float32=model.dtype == torch.float32)
            folder.write_results(metrics.as_dict(), make_page(config, metrics, environment))
    return metrics, folder.path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="a YAML file of settings; options override it")
    parser.add_argument(
        "--fresh", action="store_true", help="discard the results of an earlier run with these settings"
    )
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    file, fresh = options.pop("config"), options.pop("fresh")
    try:
        config = make_config(read_config(file) if file else {}, options)
        metrics, path = run_parity(config, fresh=fresh)
    except (CakeError, ValueError, RunBusy) as error:
        errors.print(str(error), style="bold red", markup=False)
        return FAILED
    except KeyboardInterrupt:
        errors.print("\nStopped. The same command goes on from here.", style="bold")
        return FAILED
    print_results(metrics, path)
    print(
        json.dumps({"exact": metrics.exact, "rows": metrics.rows, "skipped": len(metrics.skipped), "folder": str(path)})
    )
    if not metrics.rows:
        return FAILED
    return 0 if metrics.exact else WRONG


if __name__ == "__main__":
    sys.exit(main())
