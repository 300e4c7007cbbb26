"""A model on two devices: the CPU, and a second one that a test double makes torch believe in; see `second_device.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch

from benchmarks.children import environment
from cake_hf import CakeCache, MemoryStore
from models import CHUNK, CHUNKS, build, difference, oracle, prompt, run
from old_versions import OLD

RUNS = Path(__file__).parent / "device_runs.py"
CASES = [line[4:].split("(")[0] for line in RUNS.read_text().splitlines() if line.startswith("def case_")]


@pytest.fixture(scope="module")
def complaints() -> dict[str, str]:
    """All cases in one process of its own: torch cannot be made to forget a device."""
    command = [sys.executable, str(RUNS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment())
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_devices(case: str, complaints: dict[str, str]) -> None:
    if OLD and "offloaded_to_the_host" in case:
        pytest.skip("here older transformers mixes devices by itself, on a DynamicCache")
    assert complaints[case] == ""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus() -> None:
    model = build("llama", "bfloat16")
    where = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    where |= {f"model.layers.{number}": number % 2 for number in range(model.config.num_hidden_layers)}
    accelerate.dispatch_model(model, where)
    ids, store = prompt().to("cuda:0"), MemoryStore()
    expected = oracle(model, ids)
    for turn in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            assert difference(run(model, ids, cache), expected) == ""
            assert cache.report.chunks_loaded == turn * CHUNKS
            assert [layer.keys.device.index for layer in cache.layers] == [0, 1, 0]
