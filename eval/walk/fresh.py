"""Asks a question in a process of its own: what it knows of the document can only have come from the disk."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cake_hf.cli.models import load_model, load_tokenizer
from eval.walk.taken import Asker, Taken
from eval.walk.ways import NEW, Ways
from eval.worker import fresh_environment


@dataclass(frozen=True)
class Request:
    """The work of a new process.

    Attributes:
        model: a folder or a name.
        dtype: of the weights.
        threads: of torch.
        way: `TORCH_LOAD` or `NEW`.
        place: the file, or the store.
        ids: of the document.
        prompt: of document and question.
        tokens: of the answer.
        round: for the record.
    """

    model: str
    dtype: str
    threads: int
    way: str
    place: str
    ids: list[int]
    prompt: list[int]
    tokens: int
    round: int


def ask_in_new_process(request: Request) -> Taken:
    """Returns the answer. Starting Python, importing and loading the model are the same for every way, and not counted.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    ran = subprocess.run(
        [sys.executable, "-m", "eval.walk.fresh"],
        input=json.dumps(asdict(request)),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=fresh_environment(),
    )
    if ran.returncode:
        last = next(iter(ran.stderr.strip().splitlines()[-1:]), f"exit code {ran.returncode}")
        raise RuntimeError(f"The new process of {request.way!r} failed: {last}")
    return Taken(**json.loads(ran.stdout))


def answer(request: Request) -> Taken:
    """Answers, in the new process."""
    torch.set_num_threads(request.threads)
    model, tokenizer = load_model(request.model, request.dtype, "cpu"), load_tokenizer(request.model)
    ids, prompt = torch.tensor([request.ids]), torch.tensor([request.prompt])
    asker = Asker(model, tokenizer, (prompt,), ids.shape[1], request.tokens, request.round)
    ways = Ways(asker, ids, 0)
    place = Path(request.place)
    prepared = ways.restored(place) if request.way == NEW else ways.loaded(place)
    return ways.used_up(request.way, 0, prepared)


def main() -> int:
    """Reads a request, and prints the measurement; the output of libraries goes elsewhere."""
    request = Request(**json.loads(sys.stdin.read()))
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(answer(request).as_dict()), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
