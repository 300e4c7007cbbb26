"""A fresh process: what it knows of a prompt can only have come from the store.

`python -m eval.worker` reads a request from stdin and prints one outcome per line, as they come. It is given a batch of
prompts that it has never seen, and none of their KV.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cake_hf.cli.models import quiet_transformers
from cake_hf.errors import CakeError
from cake_hf.stores import open_store
from cake_hf.testing import WrapperStore
from eval.config import RunConfig, make_config
from eval.data.encode import Prompt
from eval.loading import load
from eval.modes import Runner
from eval.outcomes import Outcome

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Request:
    """What a fresh process is to do.

    Attributes:
        config: of the run.
        salt: of the run's chunks.
        threads: of torch; another number rounds differently, and so finds other KV.
        mode: to run each prompt in.
        prompts: to run.
    """

    config: RunConfig
    salt: str
    threads: int
    mode: str
    prompts: Sequence[Prompt]

    def to_json(self) -> str:
        """For the other process."""
        return json.dumps(
            {
                "config": self.config.as_dict(),
                "salt": self.salt,
                "threads": self.threads,
                "mode": self.mode,
                "prompts": [asdict(prompt) for prompt in self.prompts],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Request:
        """What `to_json` gave."""
        plain: dict[str, Any] = json.loads(text)
        prompts = [Prompt(**{**prompt, "ids": tuple(prompt["ids"])}) for prompt in plain.pop("prompts")]
        return cls(config=make_config(plain.pop("config")), prompts=prompts, **plain)


def run_in_fresh_process(request: Request) -> Iterator[Outcome]:
    """Outcomes of all prompts, as they come. Where the process dies, its last words are the error of those left."""
    left = {(prompt.task, prompt.row): prompt for prompt in request.prompts}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", "eval.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
            env=fresh_environment(),
        )
        try:
            for outcome in _talk(process, request):
                left.pop((outcome.task, outcome.row), None)
                yield outcome
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        complaints.seek(0)
        last = next(iter(complaints.read().strip().splitlines()[-1:]), f"exit code {code}")
    for prompt in left.values():
        yield Outcome(prompt.task, prompt.row, request.mode, error=f"the fresh process ended early: {last}")


def main() -> int:
    """The fresh process's side; returns the exit code."""
    request = Request.from_json(sys.stdin.read())
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is not an outcome
    torch.set_num_threads(request.threads)
    try:
        with quiet_transformers():
            model, tokenizer = load(request.config)
            store = WrapperStore(open_store(request.config.store))
            runner = Runner(request.config, model, tokenizer, store, request.salt)
            runner.start_up(request.prompts[0])
            for prompt in request.prompts:
                print(json.dumps(runner.run(request.mode, prompt).as_dict()), file=out, flush=True)
    except (CakeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def fresh_environment() -> dict[str, str]:
    """The environment of a new process that is to find this package, wherever it is started."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *paths])}


def _talk(process: subprocess.Popen[str], request: Request) -> Iterator[Outcome]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request.to_json())
        process.stdin.close()
    except BrokenPipeError:
        return  # it died before it read all; its complaint says why
    for line in process.stdout:
        yield Outcome.from_dict(json.loads(line))


if __name__ == "__main__":
    sys.exit(main())
