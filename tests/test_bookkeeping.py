"""What a cache does with each chunk and each decoded token, counted in calls of its code: no clock decides here."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import ones_like
from transformers import LlamaConfig, LlamaForCausalLM

import cake_hf
from cake_hf import CakeCache, MemoryStore
from models import CHUNK, prompt
from naming import given

PACKAGE = str(Path(cake_hf.__file__).parent)
FEW, MANY = 2, 6
"""Layers."""
PER_LAYER_OF_A_TOKEN, PER_LAYER_OF_A_CHUNK = 40, 60
BESIDE_THE_LAYERS = 300


def model_of(layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def calls(model: Any, chunks: int, tokens: int) -> Counter[str]:
    """Of the package's functions, by file, while a prompt is computed and tokens are decoded."""
    ids, counted = prompt(chunks * CHUNK + 3), Counter[str]()

    def count(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            counted[frame.f_code.co_filename.removeprefix(PACKAGE)] += 1

    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            model.generate(
                ids,
                attention_mask=ones_like(ids),
                **given(cache),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
            )
        finally:
            sys.setprofile(before)
        assert cache.report.chunks_computed == chunks
    return counted


def more(model: Any, *, chunks: int = 0, tokens: int = 0) -> Counter[str]:
    """Calls for so many chunks, or tokens, more: of each."""
    calls(model, 2, 2)  # what is done once per model
    few, many = calls(model, 2, 2), calls(model, 2 + chunks, 2 + tokens)
    many.subtract(few)
    return Counter({file: round(count / (chunks or tokens)) for file, count in many.items()})


@pytest.mark.parametrize(("what", "bound"), [("tokens", PER_LAYER_OF_A_TOKEN), ("chunks", PER_LAYER_OF_A_CHUNK)])
def test_the_work_per_layer_is_bounded(what: str, bound: int) -> None:
    few, many = (more(model_of(layers), **{what: 8}) for layers in (FEW, MANY))
    assert many.total() - few.total() <= (MANY - FEW) * bound, (few, many)
    assert few.total() <= BESIDE_THE_LAYERS + FEW * bound, few


@pytest.mark.parametrize("what", ["tokens", "chunks"])
def test_no_module_is_asked_by_a_call_of_its_own(what: str) -> None:
    """A model has hundreds of them."""
    few, many = (more(model_of(layers), **{what: 8})["/tensors/tree.py"] for layers in (FEW, MANY))
    assert few == many <= 2


def test_secrets_are_not_looked_for_with_each_chunk() -> None:
    """The model's name stands in each chunk. The environment may have hundreds of variables."""
    assert more(model_of(FEW), chunks=8)["/arithmetic/outside.py"] == 0
