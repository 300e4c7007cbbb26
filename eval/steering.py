"""Do steering libraries and cake_hf get along? Plain and steered answers from one store, in any order, against `generate`.

    pip install steering-vectors repeng
    python -m eval.steering --model HuggingFaceTB/SmolLM2-135M-Instruct

Exits with 1 if any answer differs from the one without cake_hf. A steered model of `steering-vectors` has forward hooks and
is computed plainly; one of `repeng` has other modules, and is restored under keys of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cake_hf import CakeCache, MemoryStore
from cake_hf.layers.compat import for_generate

CHUNK = 64
STRENGTH = 40.0
TEXT = "The history of the lighthouse keeper who wrote letters to the sea. " * 12 + "What did the keeper do?"
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def directions(model: Any) -> dict[int, torch.Tensor]:
    """Returns a direction for each of two layers in the middle."""
    layers, size = model.config.num_hidden_layers, model.config.hidden_size
    return {
        layer: STRENGTH * torch.randn(size, generator=torch.Generator().manual_seed(layer))
        for layer in (layers // 3, layers // 2)
    }


def by_hooks(model: Any) -> AbstractContextManager[Any]:
    """Forward hooks."""
    vector = import_module("steering_vectors").SteeringVector(directions(model))
    steered: AbstractContextManager[Any] = vector.apply(model)
    return steered


@contextmanager
def by_modules(model: Any) -> Iterator[None]:
    """Other modules."""
    # repeng 0.4 was written for numpy 1.
    np.float_ = np.float64  # type: ignore[attr-defined]  # numpy 2 has no such name
    repeng = import_module("repeng")
    wrapped = repeng.ControlModel(model, list(directions(model)))
    vector = {layer: value.numpy() for layer, value in directions(model).items()}
    wrapped.set_control(repeng.ControlVector(model_type="any", directions=vector), 1.0)
    try:
        yield
    finally:
        wrapped.unwrap()


def right_answers(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Returns the answers in one piece, as a plainly computed prompt has them, and in chunks."""
    return [model.generate(ids, **OPTIONS), model.generate(ids, **OPTIONS, prefill_chunk_size=CHUNK)]


def is_right(model: Any, ids: torch.Tensor, store: MemoryStore, right: list[torch.Tensor]) -> bool:
    """Whether an answer through a cache is one of those; prints how many chunks were loaded."""
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        tokens = model.generate(ids, **for_generate(model, cache), **OPTIONS)
        cache.flush()
    found = any(torch.equal(tokens, one) for one in right)
    print(f"  {'right' if found else 'WRONG'}, {cache.report.chunks_loaded} chunks loaded. {cache.report.reason}")
    return found


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m eval.steering")
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    parser.add_argument("--gguf", help="the name of a GGUF file in it")
    chosen = parser.parse_args(arguments)
    named = {"gguf_file": chosen.gguf} if chosen.gguf else {}
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32, **named).eval()
    ids = AutoTokenizer.from_pretrained(chosen.model, **named)(TEXT, return_tensors="pt").input_ids
    plain, wrong = right_answers(model, ids), 0
    for steer in (by_hooks, by_modules):
        for first in (True, False):
            store = MemoryStore()
            for steered in (first, not first, first, not first):
                print(f"Steered: {steer.__doc__}" if steered else "Plain.")
                with steer(model) if steered else nullcontext():
                    right = right_answers(model, ids) if steered else plain
                    if steered and torch.equal(right[0], plain[0]):
                        raise RuntimeError("The steering changes no token, so that nothing is shown.")
                    wrong += sum(not is_right(model, ids, store, right) for _ in range(2))
    print("All right." if not wrong else f"{wrong} answers are wrong.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
