"""What tests of commands share: a tiny model in a folder, texts for it, and a way to run `cake-hf`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from typer import Typer
from typer.testing import CliRunner, Result

from benchmarks.command import bench_app
from cake_hf import LocalStore
from cake_hf.cli.app import app
from cake_hf.cli.console import console
from models import build
from stored import values_of

Command = Callable[..., Result]

LOOKING = ("ls", "info", "verify", "verify --deep", "gc --budget 1GB --dry-run", "stats")
"""Commands that change nothing."""


def save_model(folder: Path) -> Path:
    """A tiny random model whose tokens are the words "w3" to "w127"."""
    build("llama").save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 128)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


def write_text(path: Path, words: int, seed: int = 0) -> Path:
    numbers = torch.randint(3, 128, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text(" ".join(f"w{number}" for number in numbers))
    return path


def no_progress(done: int, total: int) -> None:
    """Not a terminal."""


WIDE = 200


def run_command(*arguments: object) -> Result:
    """`cake-hf` with these arguments, on a wide terminal."""
    return _run(app, arguments)


def run_benchmark(*arguments: object) -> Result:
    """`python -m benchmarks` with these arguments, on a wide terminal."""
    return _run(bench_app, arguments)


def _run(command: Typer, arguments: Sequence[object]) -> Result:
    before = console._width  # as it was when the console was made, by whatever test came first
    console.width = WIDE
    try:
        return CliRunner(env={"COLUMNS": str(WIDE)}).invoke(command, [str(argument) for argument in arguments])
    finally:
        console._width = before


def flat(text: str) -> str:
    """Without the tables' frames and line breaks."""
    return re.sub(r"[\s│┃╭╮╰╯─━]+", " ", text)


def look_at(store: Path, command: str) -> None:
    """Runs one of `LOOKING`, which has to find nothing damaged and leave all values as they are."""
    before = values_of(LocalStore(store))
    name, *options = command.split()
    answer = run_command(name, store, *options)
    assert answer.exit_code == 0, answer.output
    assert "damaged" not in answer.output.replace("0 damaged", "").replace("none is damaged", "")
    assert values_of(LocalStore(store)) == before
