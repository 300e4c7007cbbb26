"""The source of a task's records: a folder of the user's, the Hub, or our own generator.

The benchmarks' dataset scripts no longer run, so the Hub is asked for parquet: of a mirror that has it, or of the copy that
the Hub converts by itself. The last resort is the archive in which the original keeps its JSON lines.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.data.generated import GENERATED_ROWS, generate
from eval.data.rows import BrokenRow, Row, parse_record
from eval.tasks import GENERATED, LONGBENCH, LONGBENCH_V2, SCBENCH, Task

HUB = {LONGBENCH: "zai-org/LongBench", LONGBENCH_V2: "zai-org/LongBench-v2", SCBENCH: "microsoft/SCBench"}
"""Each suite's own repository; `hub` names another one."""

CONVERTED = "refs/convert/parquet"
"""The revision that has the Hub's own parquet copy."""

ARCHIVE = "data.zip"
"""The archive with the JSON lines of LongBench's own repository."""

Load = Callable[[], Iterable[object]]


class MissingData(ValueError):
    """A task's rows are missing; the message says how to get them."""


@dataclass
class TaskRows:
    """A task's rows, usable or not.

    Attributes:
        rows: in the order of the file, but rows about one document one after another.
        skipped: "which row" -> why.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The place to look in.

    Attributes:
        data: a folder; "generated" for rows of our own; empty for the Hub.
        hub: a repository on the Hub instead of the suite's own.
        rows: the most records per task; None for all.
        seed, chars: of generated rows; chars is the length of their documents.
    """

    data: str = ""
    hub: str = ""
    rows: int | None = None
    seed: int = 0
    chars: int = 12_000


def load_rows(task: Task, source: Source) -> TaskRows:
    """Loads all rows of a task. Broken ones are counted with their reason, and the rest is used.

    Raises:
        MissingData: there are none.
    """
    found, records = TaskRows(), _records(task, source)
    for position, record in enumerate(records):
        if source.rows is not None and position >= source.rows:
            break
        try:
            if isinstance(record, BrokenRow):
                raise record
            found.rows += parse_record(task, record, position)
        except BrokenRow as error:
            found.skipped[f"record {position}"] = str(error)
    documents = {row.document: rank for rank, row in reversed(list(enumerate(found.rows)))}
    found.rows.sort(key=lambda row: documents[row.document])
    return found


def _records(task: Task, source: Source) -> Iterable[object]:
    if GENERATED in (source.data, task.suite):
        return generate(task, source.rows or GENERATED_ROWS, source.seed, source.chars)
    if source.data:
        return _local(task, Path(source.data).expanduser())
    return _from_hub(task, source.hub or HUB[task.suite])


def _local(task: Task, folder: Path) -> Iterable[object]:
    name = task.name
    listed = ["data.json"] if task.suite == LONGBENCH_V2 else []
    for candidate in (f"{name}.jsonl", f"data/{name}.jsonl", f"{name}.json", *listed):
        if (path := folder / candidate).is_file():
            # Bytes that are not text are replaced: they spoil the row they are in, not the file.
            text = path.read_text(encoding="utf-8", errors="replace")
            return _json_lines(text.split("\n")) if path.suffix == ".jsonl" else _json_list(path, text)
    for pattern in (f"{name}.parquet", f"{name}/*.parquet", f"data/{name}/*.parquet"):
        if paths := sorted(str(path) for path in folder.glob(pattern)):
            return _parquet(paths)
    raise MissingData(
        f"There is no {name}.jsonl (or .json, .parquet, or a folder {name} with parquet files) in {folder}; put the task's "
        f"rows there, or leave --data away to take them from the Hub ({HUB[task.suite]})."
    )


def _json_lines(lines: Iterable[str]) -> Iterator[object]:
    """Reads record by record, not with `datasets`, which gives up a whole file for one broken line."""
    for line in lines:
        if line.strip():
            yield _record(line)


def _record(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        return BrokenRow(f"it is not JSON ({error})")


def _json_list(path: Path, text: str) -> list[object]:
    try:
        records = json.loads(text)
    except ValueError as error:
        raise MissingData(f"The file {path} is not JSON ({error}); download it again.") from error
    if not isinstance(records, list):
        raise MissingData(f"The file {path} is not a list of records; give JSON lines or a list.")
    return records


def _parquet(paths: Sequence[str]) -> Iterable[object]:
    import datasets

    try:
        # Streamed, so that a user's file is not copied into a cache first.
        return list(datasets.load_dataset("parquet", data_files=list(paths), split="train", streaming=True))
    except Exception as error:
        raise MissingData(f"{paths[0]} cannot be read as parquet ({_first_line(error)}); download it again.") from error


def _from_hub(task: Task, repository: str) -> Iterable[object]:
    tried: list[str] = []
    for way, load in hub_ways(task, repository).items():
        records = _attempt(way, load, tried)
        if records is not None:
            return records
    raise MissingData(
        f"The rows of {task.name!r} cannot be had from the Hub's data set {repository}. Where there is no way to the Hub, "
        f"download that data set elsewhere and pass --data FOLDER with {task.name}.jsonl in it; --hub names a mirror. "
        f"Tried: {'; '.join(tried)}"
    )


def hub_ways(task: Task, repository: str) -> dict[str, Load]:
    """Returns the ways to a task's records on the Hub, best first, each under the words that an error uses for it."""
    if task.suite == LONGBENCH_V2:
        return {"its train split": lambda: _dataset(repository, split="train")}
    parquet = {"parquet": lambda: _dataset(repository, task.name, split="test")}
    if task.suite == SCBENCH:
        return parquet
    return {
        **parquet,
        "the Hub's own parquet copy": lambda: _dataset(repository, task.name, split="test", revision=CONVERTED),
        ARCHIVE: lambda: _from_archive(task, repository),
    }


def _attempt(way: str, load: Load, tried: list[str]) -> Iterable[object] | None:
    """Returns the records, or None and one more line about what was tried; an error is raised only after all ways have
    failed."""
    try:
        return load()
    except Exception as error:
        tried.append(f"{way}: {_first_line(error)}")
        return None


def _dataset(*arguments: str, **options: str) -> Iterable[object]:
    import datasets

    records: Iterable[object] = datasets.load_dataset(*arguments, **options)
    return records


def _from_archive(task: Task, repository: str) -> Iterable[object]:
    from huggingface_hub import hf_hub_download

    archive = hf_hub_download(repository, ARCHIVE, repo_type="dataset")
    with zipfile.ZipFile(archive) as files:
        text = files.read(f"data/{task.name}.jsonl").decode(errors="replace")
    return _json_lines(text.split("\n"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
