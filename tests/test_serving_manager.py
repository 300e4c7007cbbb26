"""The manager of an engine with a store: how it is made and used, what it refuses, what it tells."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import cake_hf
from cake_hf import CakeError, MemoryStore, Report
from cake_hf.serving import support
from cake_hf.transfer import telemetry
from engine_runs import (
    CHUNKS,
    COMPANY,
    DOCUMENT,
    SHORT,
    engine_config,
    generation,
    needs_engine,
    plain,
    plain_company,
    served,
    stepping,
    whole,
)
from models import CHUNK, build, prompt, shared_model
from stored import filled_store
from test_telemetry import FakeMeter
from waiting import PATIENCE, await_true

pytestmark = needs_engine

IDS = torch.tensor([DOCUMENT])


def options(**more: Any) -> dict[str, Any]:
    made = {"generation_config": generation(), "continuous_batching_config": engine_config(), "chunk_size": CHUNK}
    return {**made, **more}


def result(manager: Any, name: str) -> Any:
    found: list[Any] = []

    def came() -> bool:
        found.append(manager.get_result(name, timeout=1))
        return found[-1] is not None and found[-1].is_finished()

    await_true(came)
    return found[-1]


def test_a_manager_serves_requests_and_says_what_happened() -> None:
    model, store = shared_model("llama"), MemoryStore()
    for loaded in (0, CHUNKS):
        with cake_hf.batching(model, store, strategy="load", **options()) as manager:
            assert manager.store is store
            name = manager.add_request(DOCUMENT)
            assert result(manager, name).generated_tokens == plain_company()[1]
            report = manager.report(name)
            assert isinstance(report, Report)
            assert (report.tokens, report.chunks_loaded, report.restored) == (len(DOCUMENT), loaded, CHUNKS)
            assert report.prefill_seconds > 0
            assert f"{CHUNKS - loaded} computed" in str(report)
            short = manager.add_request(SHORT[1], request_id="short")
            assert result(manager, short).generated_tokens == plain_company()[2]
            assert "not more than one chunk" in manager.report("short").reason
            assert manager.report("nobody") is None
            assert manager.flush(PATIENCE)
        assert not manager.is_running()
        with pytest.raises(CakeError, match="closed"):
            manager.add_request(DOCUMENT)


def test_an_empty_prompt_is_refused_and_ends_nothing() -> None:
    model = shared_model("llama")
    with cake_hf.batching(model, filled_store(model, IDS), **options()) as manager:
        with pytest.raises(ValueError, match="no tokens"):
            manager.add_request([])
        assert result(manager, manager.add_request(DOCUMENT)).generated_tokens == plain_company()[1]


def test_the_model_s_own_generate_batch_finds_it() -> None:
    model: Any = shared_model("llama")
    store = filled_store(model, IDS)
    with cake_hf.batching(model, store, strategy="load", **options()) as manager:
        for _ in range(2):
            found = model.generate_batch(COMPANY, generation_config=generation(), warmup=False)
            assert [one.generated_tokens for one in found.values()] == plain_company()
            assert manager.report(list(found)[1]).chunks_loaded == CHUNKS
    assert not hasattr(model, "_cached_continuous_batching_manager")
    assert plain(model, COMPANY) == plain_company()


def test_streaming_gives_each_token() -> None:
    model = shared_model("llama")
    with cake_hf.batching(model, filled_store(model, IDS), **options()) as manager:
        manager.add_request(DOCUMENT, request_id="document", streaming=True)
        parts = [one.generated_tokens for one in manager.request_id_iter("document")]
    assert [len(part) for part in parts] == [1, 2, 3, 4, 5]
    assert parts[-1] == plain_company()[1]


def test_a_request_may_be_added_on_an_event_loop() -> None:
    model = shared_model("llama")

    async def ask(manager: Any) -> list[int]:
        done: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        manager.register_result_handler("document", lambda answer: done.set_result(answer.generated_tokens))
        manager.add_request(DOCUMENT, request_id="document")
        return await asyncio.wait_for(done, PATIENCE)

    with cake_hf.batching(model, filled_store(model, IDS), **options()) as manager:
        assert asyncio.run(ask(manager)) == plain_company()[1]


def test_several_answers_to_one_prompt() -> None:
    """The engine forks a request before its prompt's last token; answers are sampled, and so only counted."""
    from transformers import GenerationConfig

    model, store = shared_model("llama"), MemoryStore()
    several = GenerationConfig(
        max_new_tokens=4, do_sample=True, num_return_sequences=3, eos_token_id=-1, pad_token_id=0
    )
    for ids in (DOCUMENT, DOCUMENT[: CHUNK * 3 + 1], DOCUMENT[: CHUNK * 3]):
        for strategy in ("both", "load"):
            found = cake_hf.generate_batch(
                model, [ids], store=store, warmup=False, strategy=strategy, **options(generation_config=several)
            )
            assert [len(one.generated_tokens) for one in found.values()] == [4, 4, 4]


def test_what_memory_elsewhere_keeps_is_not_restored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, empty = shared_model("llama"), torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more)
    )  # needs no GPU here
    prompts = [DOCUMENT, DOCUMENT[::-1], SHORT[0] * 4]
    expected = plain(model, prompts, new=40, blocks=100)
    small = engine_config(blocks=16, cpu_offload_space=0.01)
    with stepping(model, filled_store(model, IDS), engine=small, new=40) as steps:
        for number, ids in enumerate(prompts):
            steps.manager.add_request(ids, request_id=str(number))
        steps.run()
        assert [steps.tokens(str(number)) for number in range(len(prompts))] == expected
        assert whole(steps)


def test_in_inference_mode() -> None:
    model = shared_model("llama")
    with torch.inference_mode():
        for strategy in ("both", "load"):
            tokens, reports = served(model, COMPANY, filled_store(model, IDS), strategy=strategy)
            assert (tokens, reports[1].chunks_failed) == (plain_company(), 0)


def test_it_can_be_stopped_and_started_again() -> None:
    model = shared_model("llama")
    with cake_hf.batching(model, filled_store(model, IDS), strategy="load", **options()) as manager:
        manager.stop()
        assert manager._engine is manager._loaders is manager._restorer is None
        for _ in range(2):
            manager.start()
            name = manager.add_request(DOCUMENT)
            assert result(manager, name).generated_tokens == plain_company()[1]
            assert manager.report(name).chunks_loaded == CHUNKS
            manager.stop(keep_for_next_session=True)


@pytest.mark.fault(
    "Model",
    "In continuous batching, the model is changed while the engine is paused.",
    "What was being restored is computed plainly, nothing of before is loaded or found in memory, nothing wrong is saved.",
)
def test_a_model_that_is_changed_in_a_pause() -> None:
    model, store = build("llama"), MemoryStore()
    with cake_hf.batching(model, store, **options()) as manager:
        before = result(manager, manager.add_request(DOCUMENT)).generated_tokens
        assert manager.flush(PATIENCE)
        kept = set(store.keys())
        with manager.pause(), torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)
        name = manager.add_request(DOCUMENT)
        after = result(manager, name).generated_tokens
        assert manager.report(name).chunks_loaded == 0
        assert manager.flush(PATIENCE)
        assert not kept & (set(store.keys()) - kept)
    assert after == plain(model, [DOCUMENT])[0]
    assert before != after


def test_the_model_gets_its_attention_back() -> None:
    model: Any = build("llama", attention="eager")
    expected = plain(model, COMPANY)
    tokens, reports = served(model, COMPANY, MemoryStore())
    assert tokens == expected
    assert "eager attention cannot be restored" in reports[1].reason
    assert model.config._attn_implementation == "eager"
    with pytest.raises(CakeError), cake_hf.batching(model, "nonsense://", **options()):
        pass
    assert model.config._attn_implementation == "eager"
    with cake_hf.batching(model, MemoryStore(), **options()) as manager:
        manager.stop()
        assert model.config._attn_implementation == "eager"
        manager.start()
        assert result(manager, manager.add_request(DOCUMENT)).generated_tokens == expected[1]
    assert model.config._attn_implementation == "eager"
    with stepping(model, MemoryStore()):  # is never started
        assert model.config._attn_implementation == "paged|eager"
    assert model.config._attn_implementation == "eager"


# What is refused.


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"engine": {"page": CHUNK * 2}}, "page_size is 32"),
        ({"engine": {"page": CHUNK - 4}}, "page_size is 12"),
        ({"engine": {"max_batch_tokens": 8}}, "max_batch_tokens is 8"),
        ({"engine": {"blocks": 1}}, "num_blocks is 1"),
        ({"engine": {"use_async_batching": True}}, "use_async_batching"),
        ({"chunk_size": 8}, "page_size is 16 tokens, and chunks have 8"),
        ({"stall": 0}, "stall is a share"),
        ({"stall": 1.5}, "stall is a share"),
        ({"strategy": "half"}, "strategy 'half' is unknown"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(more: dict[str, Any], words: str) -> None:
    model = shared_model("llama")
    if "engine" in more:  # not made with the parameters: older transformers have none
        more = {"continuous_batching_config": engine_config(**more["engine"])}
    with pytest.raises(ValueError, match=words), cake_hf.batching(model, MemoryStore(), **options(**more)):
        pass
    assert not hasattr(model, "_cached_continuous_batching_manager")
    assert not model._forward_pre_hooks


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "is_older_than", lambda version: True)
    with pytest.raises(CakeError, match=r"needs transformers 5.20 or newer, and \S+ is installed"):
        cake_hf.generate_batch(shared_model("llama"), [DOCUMENT], store=MemoryStore())
    with pytest.raises(CakeError, match=r"needs transformers 5.20"), cake_hf.batching(shared_model("llama")):
        pass


def test_what_the_engine_refuses_stays_refused() -> None:
    model: Any = build("llama", attention="eager")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="not supported for continuous batching"):
        cake_hf.generate_batch(model, [DOCUMENT], store=MemoryStore(), **options())
    with pytest.raises(CakeError):
        cake_hf.generate_batch(shared_model("llama"), [DOCUMENT], store="nonsense://", **options())


@pytest.mark.parametrize("begun", [False, True])
def test_ids_of_requests_under_way_are_refused(begun: bool) -> None:
    """Also while the first request of that id is still in the engine's queue."""
    with stepping(shared_model("llama"), MemoryStore()) as steps:
        steps.add("document", DOCUMENT)
        if begun:
            steps.step()
        with pytest.raises(ValueError, match="'document' is under way"):
            steps.manager.add_request(SHORT[0], request_id="document")
        steps.run()
        assert steps.tokens("document") == plain_company()[1]
        steps.add("document", DOCUMENT)
        steps.run()
        assert steps.tokens("document") == plain_company()[1]


# What is not restored yet.


@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        ("ranks", 2, "tensor-parallel"),
        ("block_bytes", (7, 0), "another layout"),
        ("step_tokens", 8, "at most 8 tokens"),
    ],
)
def test_engines_that_are_not_restored_say_why(
    what: str, value: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cake_hf.serving.seams import Engine

    monkeypatch.setattr(Engine, what, property(lambda engine: value))
    tokens, reports = served(shared_model("llama"), COMPANY, MemoryStore())
    assert tokens == plain_company()
    assert words in reports[1].reason


def test_a_model_with_a_strange_hook_is_computed_plainly() -> None:
    model, seen = build("llama"), []
    hook = model.register_forward_hook(lambda *about: seen.append(1) and None)
    try:
        tokens, reports = served(model, COMPANY, MemoryStore())
    finally:
        hook.remove()
    assert tokens == plain_company()
    assert "forward hook" in reports[1].reason


# What is told to those who watch.


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_watch", telemetry._Watch())
    meter = FakeMeter()
    telemetry.use_meter(meter)
    model, store = shared_model("llama"), MemoryStore()
    served(model, [DOCUMENT, SHORT[1]], store)
    served(model, [DOCUMENT], store, strategy="load")

    def told(name: str, kind: str) -> dict[str, float]:
        totals: dict[str, float] = {}
        for amount, about in meter.made[name].told:
            totals[about[kind]] = totals.get(about[kind], 0) + amount
        return totals

    assert told("cake_hf.requests", "cake_hf.outcome") == {"restored": 2, "plain": 1}
    assert told("cake_hf.steps", "cake_hf.kind")["alone"] == CHUNKS
    assert told("cake_hf.chunks", "cake_hf.outcome") == {
        "computed": CHUNKS, "missed": CHUNKS, "saved": CHUNKS, "loaded": CHUNKS
    }  # fmt: skip
    assert len(meter.made["cake_hf.ttft"].told) == 3
    assert len(meter.made["cake_hf.prefill.duration"].told) == 2


def test_reports_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    from cake_hf.serving import requests

    monkeypatch.setattr(requests, "MOST_REPORTS", 3)
    with stepping(shared_model("llama"), MemoryStore()) as steps:
        for number in range(5):
            steps.add(str(number), prompt(5, seed=number)[0].tolist())
            steps.run()
        assert [steps.manager.report(str(number)) is None for number in range(5)] == [True, True, False, False, False]
        assert steps.manager._requests.under_way() == []
