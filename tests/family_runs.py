"""One family through the parity runs: cold, warm in each way, with holes; every result compared bit for bit with the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import DynamicCache

from cake_hf import CakeCache, Limits, MemoryStore, UnsupportedModel
from cake_hf.model.kv_layout import kv_template
from cake_hf.testing import GateStore
from families import exists, family_model
from forwards import meeting_at
from models import CHUNK, prompt
from naming import given
from stored import filled_store, without

CHUNKS = 6
IDS = prompt(CHUNKS * CHUNK + 7)
NEW_TOKENS = 4
HOLE = 3
MEETING = 2


@dataclass(frozen=True)
class Run:
    """What a generation gave: tokens, the logits of each, and all tensors of the cache by name."""

    tokens: torch.Tensor
    logits: torch.Tensor
    content: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Verdict:
    """How a family fares.

    Attributes:
        layers: what `DynamicCache` keeps for it, in order, each kind once.
        way: "restored", "computed" or "refused"; "-" if the installed transformers does not have the family.
        reason: why not restored.
    """

    layers: str
    way: str
    reason: str = ""


def generate(model: Any, cache: Any, ids: torch.Tensor = IDS, **options: Any) -> Run:
    """Greedy generation of NEW_TOKENS tokens with that cache."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    result = model.generate(ids, **given(cache), return_dict_in_generate=True, output_logits=True, **options)
    return Run(result.sequences, torch.stack(result.logits), content(cache))


def content(cache: Any) -> dict[str, torch.Tensor]:
    """All tensors that a cache's layers keep, as copies."""
    found: dict[str, Any] = {}
    for number, layer in enumerate(cache.layers):
        for name in ("keys", "values", "indexer_keys"):
            found[f"{number}.{name}"] = getattr(layer, name, None)
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, {})
            for index, state in (states if isinstance(states, dict) else {0: states}).items():  # older ones have one
                found[f"{number}.{name}.{index}"] = state
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None and tensor.numel()}


def difference(one: Run, other: Run) -> str:
    """The first thing in which two runs are not bit for bit equal; empty if there is none."""
    if not torch.equal(one.tokens, other.tokens):
        return "tokens"
    if not torch.equal(one.logits, other.logits):
        return "logits"
    if one.content.keys() != other.content.keys():
        return f"what is kept: {sorted(one.content.keys() ^ other.content.keys())}"
    return next((name for name, tensor in one.content.items() if not torch.equal(tensor, other.content[name])), "")


@cache
def expected(family: str) -> Run:
    """The law's reference: chunked prefill on a `DynamicCache`."""
    model: Any = family_model(family)
    return generate(model, DynamicCache(config=model.config), prefill_chunk_size=CHUNK)


def kinds(family: str) -> str:
    """What `DynamicCache` keeps for the family, each kind once."""
    names = [type(layer).__name__ for layer in DynamicCache(config=family_model(family).config).layers]
    return ", ".join(dict.fromkeys(names))


def examine(family: str) -> Verdict:
    """Run the family in every way and say how it fares.

    Raises:
        AssertionError: a result differs from the oracle's, or the report from what happened.
    """
    if not exists(family):
        return Verdict("", "-", "this version of transformers does not have it")
    model = family_model(family)
    try:
        CakeCache(model, MemoryStore(), chunk_size=CHUNK).close()
    except UnsupportedModel as refusal:
        return Verdict(kinds(family), "refused", str(refusal))
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cold:
        run = generate(model, cold)
        assert cold.flush(60)
        report = cold.report
    if not report.chunks_saved:
        examine_computed(family)
        return Verdict(kinds(family), "computed", report.reason)
    check(family, run, "cold")
    single: Any = family_model(family)
    # One big forward rounds differently, so its logits are not the same; its tokens are.
    assert torch.equal(run.tokens, generate(single, DynamicCache(config=single.config)).tokens), (
        f"{family}, in one piece"
    )
    assert (report.chunks_computed, report.chunks_missed, report.chunks_loaded) == (CHUNKS, CHUNKS, 0)
    examine_restored(family)
    return Verdict(kinds(family), "restored")


def examine_computed(family: str) -> None:
    """Not restored, and never half: one big forward, as without us."""
    model: Any = family_model(family)
    store = MemoryStore()
    plain = generate(model, DynamicCache(config=model.config))
    for turn in ("first", "second"):
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            run = generate(model, cache)
            assert cache.report.reason
            assert cache.flush(60)
        assert difference(run, plain) == "", f"{family}, {turn}"
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        assert cache.prefill(IDS).reason
        assert difference(generate(model, cache), plain) == "", f"{family}, prefilled"
    assert list(store.keys()) == []


def examine_restored(family: str) -> None:
    """All loaded; both sides, meeting at a given chunk; and a hole that is computed."""
    model = family_model(family)
    store = filled_store(model, IDS)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        check(family, generate(model, cache), "loaded")
        report = cache.report
        assert (report.chunks_loaded, report.chunks_computed, report.chunks_failed) == (CHUNKS, 0, 0), report
    gate = GateStore(store)
    with CakeCache(
        model, gate, chunk_size=CHUNK, save=False, limits=Limits.from_environment(loader_threads=1)
    ) as cache:
        kv_template(model)  # runs the model once, which must not count
        states = len(list(store.keys())) - CHUNKS
        with meeting_at(model, gate, MEETING, CHUNKS - MEETING, states):
            check(family, generate(model, cache), "both")
        assert (cache.report.chunks_computed, cache.report.chunks_loaded) == (MEETING, CHUNKS - MEETING), cache.report
    holed = without(store, HOLE)
    with CakeCache(model, holed, chunk_size=CHUNK, strategy="load") as cache:
        check(family, generate(model, cache), "with a hole")
        assert cache.flush(60)
        assert cache.report.chunks_missed == cache.report.chunks_saved == 1, cache.report
    assert all(holed.read(key) == store.read(key) for key in store.keys())  # noqa: SIM118


def check(family: str, run: Run, way: str) -> None:
    different = difference(run, expected(family))
    assert not different, f"{family}, {way}: other {different} than the oracle"
