"""The settings of a run: one dataclass, filled from a YAML file and, over that, from the command line."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from cake_hf.limits import MIN_CHUNK_SIZE
from cake_hf.util.redaction import shown_url
from eval.tasks import find_task

MODES = ("plain", "chunked", "cold", "warm", "middle", "faults")
"""The ways to run each row, in order: the others are compared with `plain` and `chunked`."""

TOO_LONG = ("truncate", "skip")


class BrokenConfig(ValueError):
    """The settings cannot be used; the message says what to change."""


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise ValueError(value)
    return tuple(value)


def _yes(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _option(default: Any, convert: Callable[[Any], Any], text: str) -> Any:
    """Declares a setting: its default, how to parse its value from a file or the command line, and its purpose."""
    return field(default=default, metadata={"convert": convert, "help": text})


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. Each one is a key of the YAML file and an option of the command line."""

    model: str = _option("", str, "a folder, a name on the Hugging Face Hub, or recall-tiny, which comes with cake_hf")
    tokenizer: str = _option("", str, "where the tokenizer is, if not beside the model")
    tasks: tuple[str, ...] = _option((), _names, "tasks of LongBench, LongBench v2 or SCBench, or recall; with commas")
    store: str = _option("", str, "where the KV goes: a directory or a URL that other processes can open, too")
    data: str = _option(
        "", str, "a folder with <task>.jsonl or parquet; 'generated' for made-up rows [default: the Hub]"
    )
    hub: str = _option("", str, "a repository on the Hub to take the rows from, instead of the benchmark's own")
    prompts: str = _option("", str, "a YAML file of prompts, like eval/data/prompts.yaml, that go before our own")
    rows: int | None = _option(None, int, "records of each task at most [default: all; 4 of generated ones]")
    chars: int = _option(12_000, int, "length of generated documents, in characters")
    seed: int = _option(0, int, "of generated rows and of faults")
    dtype: str = _option("auto", str, "of the weights, and so of the KV: auto, float32, bfloat16 or float16")
    device: str = _option("auto", str, "as torch names it; auto is the GPU where there is one")
    threads: int | None = _option(None, int, "of torch, on the CPU [default: its own choice]")
    chunk_size: int = _option(512, int, "tokens per chunk, of the cache and of the chunked run")
    new_tokens: int | None = _option(None, int, "generated at most [default: what the benchmark says for the task]")
    min_new_tokens: int = _option(0, int, "generated at least, for models that would stop at once")
    max_tokens: int | None = _option(None, int, "of prompt and answer together [default: what the model was made for]")
    too_long: str = _option("truncate", str, "longer prompts lose their middle (truncate), or are left out (skip)")
    modes: tuple[str, ...] = _option(MODES, _names, f"which of {', '.join(MODES)}; the first two always run")
    fault_rate: float = _option(0.3, float, "share of reads that go wrong in the run with faults")
    batch_tokens: int = _option(
        65_536, int, "of prompts that are stored at a time; after each batch comes a fresh process"
    )
    save_queue_gib: float = _option(4.0, float, "memory for chunks that wait to be written")
    keep_chunks: bool = _option(False, _yes, "leave the KV in the store")
    sabotage: bool = _option(False, _yes, "flip a bit of what is loaded, checksum off: the run must then exit with 1")
    out: str = _option(".eval/runs", str, "the folder that runs are kept in, each in one named by its settings' hash")

    def __post_init__(self) -> None:
        """Raises BrokenConfig, or UnknownTask."""
        for name in self.tasks:
            find_task(name)
        unknown = sorted(set(self.modes) - set(MODES))
        if unknown:
            raise BrokenConfig(f"There is no mode {unknown[0]!r}; choose from {', '.join(MODES)}.")
        if self.too_long not in TOO_LONG:
            raise BrokenConfig(f"too_long is {self.too_long!r}; it is one of {', '.join(TOO_LONG)}.")
        for name in ("rows", "threads", "new_tokens", "max_tokens", "chars", "batch_tokens", "save_queue_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BrokenConfig(f"{name} is {value}; it has to be more than 0.")
        if self.chunk_size < MIN_CHUNK_SIZE:
            raise BrokenConfig(f"chunk_size is {self.chunk_size}; it has to be at least {MIN_CHUNK_SIZE}.")
        if not 0 <= self.fault_rate <= 1:
            raise BrokenConfig(f"fault_rate is {self.fault_rate}; it is a share, from 0 to 1.")
        # The oracles come first, whatever was asked for, and all modes in the order in which they build on each other.
        wanted = {"plain", "chunked", *self.modes} | ({"cold"} if set(self.modes) & set(MODES[3:]) else set())
        object.__setattr__(self, "modes", tuple(mode for mode in MODES if mode in wanted))

    def check_complete(self) -> None:
        """Raises BrokenConfig unless there is enough to run."""
        for name, example in (("model", "Qwen/Qwen3-0.6B"), ("tasks", "qasper,hotpotqa"), ("store", "/tmp/kv")):
            if not getattr(self, name):
                raise BrokenConfig(f"Say --{name}, for example --{name} {example}.")

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def for_people(self) -> dict[str, Any]:
        """Returns the values of `as_dict`, without a password in the store's URL."""
        return {**self.as_dict(), "store": shown_url(self.store)}

    @property
    def digest(self) -> str:
        """Returns 12 hexadecimal digits that identify all settings but `out`."""
        settings = {name: value for name, value in self.as_dict().items() if name != "out"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


SETTINGS: dict[str, Field[Any]] = {setting.name: setting for setting in fields(RunConfig)}


def read_config(path: Path) -> dict[str, Any]:
    """Reads the settings from a YAML file.

    Raises:
        BrokenConfig: it cannot be read, or has an unknown setting.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BrokenConfig(f"The settings {path} cannot be read: {error}") from error
    if not isinstance(found, Mapping):
        raise BrokenConfig(f"The settings {path} are no mapping; write lines like  chunk_size: 512.")
    unknown = sorted(str(name) for name in found if name not in SETTINGS)
    if unknown:
        raise BrokenConfig(f"There is no setting {unknown[0]!r} ({path}); known are {', '.join(SETTINGS)}.")
    return dict(found)


def make_config(*layers: Mapping[str, Any]) -> RunConfig:
    """Builds a config from layers of settings, later ones over earlier ones.

    Raises:
        BrokenConfig, UnknownTask: they cannot be used.
    """
    merged = {name: value for layer in layers for name, value in layer.items()}
    return replace(RunConfig(), **{name: _converted(name, value) for name, value in merged.items()})


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each setting; those that are not given do not appear in the result."""
    for name, setting in SETTINGS.items():
        default, text = setting.default, setting.metadata["help"].replace("%", "%%")
        if default not in (None, "", (), MISSING) and not isinstance(default, (bool, tuple)):
            text += f" [default: {default}]"
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar=name.upper(), help=text)


def _converted(name: str, value: Any) -> Any:
    setting = SETTINGS[name]
    if value is None and setting.default is None:
        return None
    try:
        if isinstance(value, bool) != isinstance(setting.default, bool):
            raise ValueError(value)
        return setting.metadata["convert"](value)
    except (TypeError, ValueError) as error:
        raise BrokenConfig(f"{name} is {value!r}; it is meant to be {setting.metadata['help']}.") from error
