"""One process of the demonstration: `python -m demo.worker FOLDER` answers the question in the folder.

A process of its own starts with nothing in memory, so whatever it knows of the prompt came from the store.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.children import environment
from cake_hf.cache import CakeCache
from cake_hf.cli.models import load_model, quiet_transformers
from cake_hf.errors import CakeError
from demo.asking import Answer, ask_with_store, warm_up

_REQUEST = "request.json"
_PROMPT = "prompt.safetensors"


@dataclass(frozen=True)
class Request:
    """The settings that a worker needs beside the prompt.

    Attributes:
        model, dtype, device: as `load_model` takes them.
        store: a directory.
        chunk_size: tokens.
        new_tokens: to generate at most.
        strategy: of the `CakeCache`; "compute" is the cold run, whatever the store has.
        threads: of torch; another number rounds differently, and so finds other KV.
    """

    model: str
    dtype: str
    device: str
    store: str
    chunk_size: int
    new_tokens: int
    strategy: str
    threads: int

    def write(self, folder: Path, ids: torch.Tensor) -> None:
        """Writes it, and the prompt `[1, tokens]`, into a new folder."""
        folder.mkdir()
        (folder / _REQUEST).write_text(json.dumps(asdict(self)))
        save_file({"ids": ids.contiguous()}, folder / _PROMPT)


def ask_in_fresh_process(request: Request, ids: torch.Tensor, folder: Path) -> Answer:
    """Runs a worker on the request.

    Args:
        request: what to do.
        ids: `[1, tokens]` of the prompt.
        folder: made here, for the files that the two processes exchange.

    Raises:
        CakeError: the worker failed; with the last line of its stderr.
    """
    request.write(folder, ids)
    command = [sys.executable, "-m", "demo.worker", str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
        raise CakeError(f"A fresh process could not answer: {complaint}")
    return Answer.load(folder)


def answer_request(folder: Path) -> None:
    """Answers, in the worker."""
    request = Request(**json.loads((folder / _REQUEST).read_text()))
    ids = load_file(folder / _PROMPT)["ids"]
    torch.set_num_threads(request.threads)
    with quiet_transformers():
        model = load_model(request.model, request.dtype, request.device)
        warm_up(model, ids, request.chunk_size)
        cache = CakeCache(model, request.store, chunk_size=request.chunk_size, strategy=request.strategy)
        ask_with_store(model, ids, request.new_tokens, cache).save(folder)


def main(arguments: Sequence[str]) -> None:
    """Takes one folder as argument; an expected error is the last line on stderr, for the caller to pass on."""
    try:
        answer_request(Path(arguments[0]))
    except (CakeError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(sys.argv[1:])
