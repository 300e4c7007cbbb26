"""A run's folder: its settings, every outcome as soon as there is one, and what to clean up. What makes a run resumable.

<out>/<hash of the settings>/
    config.yaml         the settings, resolved
    environment.json    machine, versions, the model's weights
    outcomes.jsonl      one line per row and mode, as they come
    predictions/        <mode>.jsonl, as `python -m eval.score` takes them
    metrics.json        what came of it
    report.html         the same, to look at
    chunks.txt          keys that this run has put into the store and not yet removed
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import yaml

from benchmarks.machine import describe
from cake_hf.errors import StoreError
from cake_hf.model.fingerprint import weights_digest
from cake_hf.model.numerics import numerics_metadata
from cake_hf.stores import Store
from eval.compare import ORACLES
from eval.config import RunConfig
from eval.outcomes import Outcome

LIBRARIES = ("tokenizers", "datasets", "evaluate", "huggingface_hub", "safetensors", "numpy")


class RunBusy(RuntimeError):
    """Another process works on the same run."""


class RunFolder:
    """One run on disk.

    Args:
        config: its settings, which name the folder.
        environment: where it runs now; see `describe_environment`.
        fresh: discard the results of an earlier process.

    Attributes:
        path: of the folder.
        salt: of this run's chunks, drawn anew when it starts over.
        outcomes: all so far, by (task, row, mode). Of incomplete rows only the oracles' count, since the chunks that the
            others loaded may be gone.
        restarted: whether outcomes from another environment, which cannot be compared, were discarded.

    Raises:
        RunBusy: another process works on the same run.
    """

    def __init__(self, config: RunConfig, environment: dict[str, Any], *, fresh: bool = False) -> None:
        self.path = Path(config.out).expanduser() / config.digest
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        before = _read_json(self.path / "environment.json")
        self.restarted = bool(before) and before.get("numerics") != environment["numerics"]
        if fresh or self.restarted or "salt" not in before:
            (self.path / "outcomes.jsonl").unlink(missing_ok=True)
            before = {"salt": secrets.token_hex(8)}
        self.salt: str = before["salt"]
        self._write("config.yaml", yaml.safe_dump(config.for_people(), sort_keys=False, allow_unicode=True))
        self._write("environment.json", json.dumps({"salt": self.salt, **environment}, indent=2) + "\n")
        self.outcomes = {outcome.key: outcome for outcome in self._read_outcomes(config.modes)}

    def add(self, outcome: Outcome) -> None:
        """Adds an outcome; it is on disk when this returns."""
        self.outcomes[outcome.key] = outcome
        with (self.path / "outcomes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome.as_dict()) + "\n")

    def write_predictions(self, mode: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes one mode's texts, as `python -m eval.score` takes them."""
        (self.path / "predictions").mkdir(exist_ok=True)
        self._write(f"predictions/{mode}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def write_results(self, metrics: Mapping[str, Any], page: str) -> None:
        """Writes the results of the run, for machines and for people."""
        self._write("metrics.json", json.dumps(metrics, indent=2) + "\n")
        self._write("report.html", page)

    def note_chunk(self, key: str) -> None:
        """Notes that a chunk is about to be written, so that it can be removed. Called from the writer's thread."""
        with (self.path / "chunks.txt").open("a", encoding="ascii") as file:
            file.write(key + "\n")

    def remove_chunks(self, store: Store) -> list[str]:
        """Deletes all chunks that were noted, also those of an earlier process that was killed.

        Returns:
            Those that the store would not delete; they stay noted.
        """
        noted = self.path / "chunks.txt"
        keys = dict.fromkeys(noted.read_text(encoding="ascii").split()) if noted.exists() else {}
        left = [key for key in keys if not _deleted(store, key)]
        self._write("chunks.txt", "".join(key + "\n" for key in left))
        return left

    def close(self) -> None:
        """Lets other processes work on this run."""
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_outcomes(self, modes: Sequence[str]) -> list[Outcome]:
        """Reads the valid lines of the file and drops the others, since a killed process may have left half a line."""
        file = self.path / "outcomes.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        good = [outcome for outcome in map(_parse_outcome, lines) if outcome is not None and not outcome.error]
        ran = {outcome.key for outcome in good}
        found = [
            outcome
            for outcome in good
            if outcome.mode in ORACLES or all((outcome.task, outcome.row, mode) in ran for mode in modes)
        ]
        self._write("outcomes.jsonl", "".join(json.dumps(outcome.as_dict()) + "\n" for outcome in found))
        return found

    def _write(self, name: str, text: str) -> None:
        """Writes a file whole or not at all."""
        target = self.path / name
        partial = target.with_name(target.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)


def _locked(folder: Path) -> IO[str]:
    """Returns a file that stays locked until it is closed, or its process dies."""
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunBusy(f"Another process works on this run ({folder}); wait for it, or change a setting.") from None
    return file


def describe_environment(model: Any) -> dict[str, Any]:
    """Describes machine, versions and the model's content. Outcomes are comparable only if `numerics` is the same."""
    versions = {name: _version(name) for name in LIBRARIES}
    machine = describe()
    numerics = {
        "weights": weights_digest(model),
        "dtype": str(model.dtype),
        **{name: machine[name] for name in ("transformers", "cake_hf")},
        **numerics_metadata(model),
    }
    return {"numerics": json.loads(json.dumps(numerics, default=str)), "machine": machine, "versions": versions}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _deleted(store: Store, key: str) -> bool:
    try:
        store.delete(key)
    except StoreError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _parse_outcome(line: str) -> Outcome | None:
    try:
        return Outcome.from_dict(json.loads(line))
    except (ValueError, TypeError):
        return None
