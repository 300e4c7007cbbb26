"""The small model of our own: it recalls from a long context, so that a wrong KV shows as a wrong answer."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cake_hf import CakeCache, MemoryStore
from cake_hf.assets import RECALL_TINY
from cake_hf.chunks.codec import checksums, encode_header, header_size, parse_header
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.testing.haystack import KEYS, VALUES, hide, make_facts, question, real_text

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
from eval_recall import accuracy
from naming import given


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(RECALL_TINY)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(RECALL_TINY)


def test_the_recall_model_is_under_4_mib() -> None:
    assert sum(path.stat().st_size for path in RECALL_TINY.iterdir()) <= 4 * 2**20


def test_it_recalls_from_2k_tokens(model: Any, tokenizer: Any) -> None:
    """96 questions; `training/eval_recall.py` asks more, at more lengths."""
    assert accuracy(model, tokenizer, 2048, contexts=8) >= 0.95


def test_keys_and_values_are_single_tokens(tokenizer: Any) -> None:
    assert all(len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1 for word in KEYS + VALUES)


def test_a_wrong_kv_shows_as_a_wrong_answer(model: Any, tokenizer: Any) -> None:
    """Exchange the stored chunk with the fact for one from another text, hidden from the checksum."""
    fact, other = make_facts(2)
    filler = real_text(6000)
    ids = {
        name: tokenizer(hide(filler, [told], [0.5]) + question(told.key), return_tensors="pt").input_ids
        for name, told in (("true", fact), ("false", other))
    }
    stores = {name: MemoryStore() for name in ids}

    def answer(name: str) -> str:
        with CakeCache(model, stores[name], chunk_size=64, strategy="load") as cache:
            tokens = model.generate(ids[name], **given(cache), max_new_tokens=1)
            return str(tokenizer.decode(tokens[0, -1]))

    assert [answer("true"), answer("false")] == [fact.answer, other.answer]
    assert answer("true") == fact.answer  # from the store now
    with CakeCache(model, stores["true"], chunk_size=64) as cache:
        swap_payloads(stores["false"], stores["true"], cache._session.bound_model.layout())
    assert answer("true") != fact.answer


def swap_payloads(source: MemoryStore, target: MemoryStore, layout: ChunkLayout) -> None:
    """Give the target's chunks the payloads of the source's chunks at the same places."""
    payloads = {}
    for key in source.keys():  # noqa: SIM118  # a store is no mapping
        value = source.read(key)
        assert value is not None
        payloads[parse_header(value)[0].index] = value[header_size(layout) :]
    for key in list(target.keys()):
        value = target.read(key)
        assert value is not None
        facts, _ = parse_header(value)
        payload = payloads[facts.index]
        header = encode_header(layout, replace(facts, checksums=checksums(payload, layout)))
        target.write(key, [header, payload], replace=True)
