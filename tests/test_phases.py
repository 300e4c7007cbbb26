"""A cache is in one phase at a time, and whatever ends a prompt, it is idle again and restores the next one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cake_hf
from cake_hf import CakeCache, MemoryStore
from cake_hf.cache.phase import Phase
from cake_hf.restore.plan import RestorePlan
from cake_hf.restore.prompt import PrefixMatch
from cake_hf.restore.restore import Restore
from models import CHUNK, CHUNKS, TAIL, build, prompt, run
from naming import given

IDS = prompt()


def stored() -> tuple[torch.nn.Module, MemoryStore]:
    model, store = build("llama"), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        run(model, IDS, cache)
    return model, store


def watch(model: Any, cache: CakeCache) -> list[tuple[Phase, int]]:
    """Phase and tokens of each forward of the model."""
    seen: list[tuple[Phase, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(
            (cache._work.phase, kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1])
        )

    model.model.layers[0].register_forward_pre_hook(cake_hf.reads_only(note), with_kwargs=True)
    return seen


def test_phases_of_a_computed_prompt() -> None:
    model = build("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK, strategy="compute") as cache:
        seen = watch(model, cache)
        assert cache._work.phase is Phase.IDLE
        run(model, IDS, cache, max_new_tokens=2)
        assert seen == [*[(Phase.RESTORING, CHUNK)] * CHUNKS, (Phase.SUFFIX, TAIL), (Phase.IDLE, 1)]
        assert cache._work.phase is Phase.IDLE


def test_phases_of_a_prefilled_document_and_its_question() -> None:
    model, store = stored()
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        cache.prefill(IDS[:, : 3 * CHUNK])
        assert cache._work.phase is Phase.PREFILLED
        seen = watch(model, cache)
        run(model, IDS[:, : 3 * CHUNK + TAIL], cache, max_new_tokens=1)
        assert seen == [(Phase.SUFFIX, TAIL)]
        assert cache._work.phase is Phase.IDLE


def test_phases_of_a_batch() -> None:
    model = build("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        seen = watch(model, cache)
        model.generate(torch.cat([IDS, prompt(seed=2)]), **given(cache), max_new_tokens=1, do_sample=False)
        assert seen[-1] == (Phase.BATCH, TAIL)
        assert cache._work.phase is Phase.IDLE


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-CHUNK),
        lambda cache: cache.reset(),
        lambda cache: cache.prefill(torch.cat([IDS[:, : 3 * CHUNK], IDS[:, :CHUNK]], dim=1)[:, : 3 * CHUNK]),
    ],
    ids=["crop", "reset", "prefill"],
)
def test_a_prefilled_prompt_is_forgotten_with_the_content(change: Callable[[CakeCache], object]) -> None:
    model, store = stored()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(IDS[:, : 3 * CHUNK])
        report = cache.report
        change(cache)
        assert cache._prefilled is None or cache._prefilled.report is not report


def test_a_copy_of_what_was_prefilled_is_prefilled() -> None:
    model, store = stored()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(IDS[:, : 3 * CHUNK])
        copied = copy.deepcopy(cache)
        assert copied._work.phase is Phase.PREFILLED
        copied.reset()
        assert (copied._work.phase, cache._work.phase) == (Phase.IDLE, Phase.PREFILLED)


class Stop(BaseException):
    """As an interrupt."""


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stop


@pytest.mark.fault(
    "Prompt",
    "`prefill` is interrupted: while it computes, by its progress callback, or while it waits for its loaders.",
    "The cache gives the prompt up, and restores the next one.",
)
@pytest.mark.parametrize("where", ["progress", "run", "close", "start"])
@pytest.mark.parametrize("past", [0, CHUNK])
def test_an_interrupted_prefill_leaves_the_cache_idle(where: str, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = stored()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        if past:
            cache.prefill(IDS[:, :past])
        with monkeypatch.context() as patch:
            if where != "progress":
                patch.setattr(Restore, where, stop)
            with pytest.raises(Stop):
                cache.prefill(IDS, progress=stop)
        assert cache._work.phase is Phase.IDLE
        assert cache.get_seq_length() == past
        cache.prefill(IDS)
        assert cache.report.chunks_loaded + cache.report.chunks_computed == CHUNKS - past // CHUNK
        expected = CakeCache(model, MemoryStore(), chunk_size=CHUNK)
        expected.prefill(IDS)
        for layer, other in zip(cache.layers, expected.layers, strict=True):
            assert torch.equal(layer.keys, other.keys)
        expected.close()


@pytest.mark.parametrize("where", ["run", "close", "start"])
def test_an_interrupted_generate_leaves_the_cache_idle(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = stored()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        with monkeypatch.context() as patch:
            patch.setattr(Restore, where, stop)
            with pytest.raises(Stop):
                run(model, IDS, cache)
        assert cache.get_seq_length() == 0
        assert cache._work.phase is Phase.IDLE
        run(model, IDS, cache)
        assert cache.report.chunks_loaded + cache.report.chunks_computed == CHUNKS


def test_the_prefix_match_and_the_plan_are_immutable() -> None:
    match = PrefixMatch.none(2)
    assert (match.stored, match.states, match.refusal) == ((False, False), (False, False), None)
    plan = RestorePlan((True,), {}, None, loads=True, ranges=1)
    for frozen, name in ((match, "stored"), (plan, "usable")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, ())
