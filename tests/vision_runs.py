"""Prompts with images through the parity runs: cold, warm in each way, with a hole; every result compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import DynamicCache

from cake_hf import CakeCache, Limits, MemoryStore, Store, reads_only
from cake_hf.model.kv_layout import kv_template
from cake_hf.testing import GateStore
from family_runs import Run, Verdict, difference, generate, meeting_at, without
from models import CHUNK
from vision_models import inputs_for, standard_parts, vision_model

CHUNKS = 6
MEETING = 2
HOLE = 3
"""A chunk with a part of the second image."""

Inputs = dict[str, torch.Tensor]


def ask(family: str, cache: Any, inputs: Inputs, model: Any = None, **options: Any) -> Run:
    """Greedy generation with that cache."""
    model = vision_model(family) if model is None else model
    inputs = dict(inputs)
    return generate(model, cache, inputs.pop("input_ids"), **inputs, **options)


def one_by_one(model: Any, family: str, inputs: Inputs) -> dict[str, Any]:
    """The inputs with the images embedded, each by itself, as `generate` takes them."""
    inputs = dict(inputs)
    pixels = inputs.pop("pixel_values", None)
    if pixels is None:
        return inputs
    grid = inputs.get("image_grid_thw")
    with torch.no_grad():
        if grid is None:
            outputs = [model.model.get_image_features(one[None], return_dict=True) for one in pixels]
        else:
            patches = pixels.split(grid.prod(dim=-1).tolist())
            outputs = [
                model.model.get_image_features(one, image_grid_thw=shape[None], return_dict=True)
                for one, shape in zip(patches, grid, strict=True)
            ]
    merged = outputs[0]
    if isinstance(merged.pooler_output, torch.Tensor):
        merged.pooler_output = torch.cat([one.pooler_output for one in outputs])
    else:
        merged.pooler_output = [features for one in outputs for features in one.pooler_output]
    if getattr(merged, "deepstack_features", None) is not None:
        levels = range(len(merged.deepstack_features))
        merged.deepstack_features = [[f for one in outputs for f in one.deepstack_features[level]] for level in levels]
    return {**inputs, "mm_encoder_outputs": {"image": merged}}


def oracle(family: str, inputs: Inputs, model: Any = None) -> Run:
    """The law's reference: transformers' own chunked prefill on a `DynamicCache`, each image embedded by itself."""
    model = vision_model(family) if model is None else model
    plain = DynamicCache(config=model.config)
    return ask(family, plain, one_by_one(model, family, inputs), model, prefill_chunk_size=CHUNK)


@cache
def standard(family: str) -> Inputs:
    """Six chunks and seven tokens, with two images."""
    return inputs_for(family, standard_parts(family))


@cache
def expected(family: str) -> Run:
    """Of the standard prompt."""
    return oracle(family, standard(family))


def fill(family: str, store: Store, inputs: Inputs, model: Any = None, **settings: Any) -> CakeCache:
    """Run a prompt and save it; returns the closed cache, for its report."""
    with CakeCache(vision_model(family) if model is None else model, store, chunk_size=CHUNK, **settings) as cold:
        ask(family, cold, inputs, model)
        assert cold.flush(60)
    return cold


@cache
def _filled(family: str) -> MemoryStore:
    store = MemoryStore()
    fill(family, store, standard(family))
    return store


def filled(family: str) -> MemoryStore:
    """A store of one's own with the chunks of the standard prompt."""
    return without(_filled(family))


@contextmanager
def counting_images(model: Any) -> Iterator[list[int]]:
    """How many entries (images, or patches of them) went through the vision part, call by call."""
    seen: list[int] = []
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    handle = tower.register_forward_pre_hook(
        reads_only(lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"]))),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        handle.remove()


def forget_delta(model: Any) -> int | None:
    """By how much images have shifted the last prompt's positions, as the model keeps it on itself; it keeps nothing then."""
    kept = getattr(model.model, "rope_deltas", None)
    if kept is None:
        return None
    model.model.rope_deltas = None
    return int(kept.item())


def examine_vision(family: str) -> Verdict:
    """Run the standard prompt in every way and say how the family fares.

    Raises:
        AssertionError: a result differs from the oracle's, or the report from what happened.
    """
    model, inputs, store = vision_model(family), standard(family), MemoryStore()
    layers = ", ".join(dict.fromkeys(type(layer).__name__ for layer in DynamicCache(config=model.config).layers))
    plain = ask(family, DynamicCache(config=model.config), inputs)
    delta = forget_delta(model)

    def check(run: Run, way: str) -> None:
        kept = forget_delta(model)
        assert kept == delta, f"{family}, {way}: other rope_deltas"
        different = difference(run, expected(family))
        assert not different, f"{family}, {way}: other {different} than the oracle"
        forget_delta(model)

    with CakeCache(model, store, chunk_size=CHUNK) as cold:
        run = ask(family, cold, inputs)
        assert cold.flush(60)
        if not cold.report.chunks_saved:
            assert difference(run, plain) == "", family
            return Verdict(layers, "computed", cold.report.reason)
    check(run, "cold")
    # In one piece everything rounds differently; the tokens are the same.
    assert torch.equal(run.tokens, plain.tokens), f"{family}, in one piece"
    _examine_warm(family, store, check)
    return Verdict(layers, "restored")


def _examine_warm(family: str, store: MemoryStore, check: Any) -> None:
    model, inputs = vision_model(family), standard(family)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache, counting_images(model) as seen:
        check(ask(family, cache, inputs), "loaded")
        assert (cache.report.chunks_loaded, cache.report.chunks_computed) == (CHUNKS, 0), cache.report
        assert not seen, "images went through the vision part, though all of their tokens were loaded"
    gate = GateStore(store)
    with CakeCache(
        model, gate, chunk_size=CHUNK, save=False, limits=Limits.from_environment(loader_threads=1)
    ) as cache:
        kv_template(model)  # runs the model once, which must not count
        with meeting_at(model, gate, MEETING, CHUNKS - MEETING), counting_images(model) as seen:
            check(ask(family, cache, inputs), "both")
        assert (cache.report.chunks_computed, cache.report.chunks_loaded) == (MEETING, CHUNKS - MEETING), cache.report
        assert len(seen) == 1, "the first image alone has tokens in front of where the sides meet"
    holed = without(store, HOLE)
    with CakeCache(model, holed, chunk_size=CHUNK, strategy="load") as cache:
        check(ask(family, cache, inputs), "with a hole")
        assert cache.flush(60)
        assert cache.report.chunks_missed == cache.report.chunks_saved == 1, cache.report
    assert all(holed.read(key) == store.read(key) for key in store.keys())  # noqa: SIM118
