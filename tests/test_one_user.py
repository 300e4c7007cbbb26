"""A cache in several threads, closed in the midst of a prompt, copied, pickled, and behind a forward with gradients."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

from cake_hf import CakeCache, CakeError, MemoryStore, reads_only
from cake_hf.report import Refusal
from families import family_model, here
from models import CHUNK, CHUNKS, build, difference, oracle, prompt, run, shared_model
from naming import cache_of, given
from stored import filled_store
from waiting import PATIENCE, await_true

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TOKENS = prompt().shape[1]


class Held:
    """One forward of a model that waits until it is let go."""

    def __init__(self) -> None:
        self.is_in = threading.Event()
        self.let_go = threading.Event()


@contextmanager
def held(module: torch.nn.Module, forward: int) -> Iterator[Held]:
    """That forward (the first is 1) of a part of a model is held."""
    count, gate = 0, Held()

    def wait(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == forward:
            gate.is_in.set()
            assert gate.let_go.wait(PATIENCE)

    handle = module.register_forward_pre_hook(reads_only(wait))
    try:
        yield gate
    finally:
        gate.let_go.set()
        handle.remove()


class Thread(threading.Thread):
    """Keeps what the call gave, or raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._call()
        except BaseException as error:
            self.outcome = error

    def end(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive()
        return self.outcome


def ask(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(ids, **given(cache), **OPTIONS)
    return tokens


USES: dict[str, Callable[[Any, CakeCache], Any]] = {
    "the same prompt": lambda model, cache: ask(model, cache, prompt()),
    "another prompt": lambda model, cache: ask(model, cache, prompt(200, seed=9)),
    "a forward": lambda model, cache: model(prompt(20, seed=3), **given(cache)),
    "one token": lambda model, cache: model(prompt(1, seed=3), **given(cache)),
    "the decoder alone": lambda model, cache: model.model(prompt(20, seed=3), **given(cache)),
    "prefill": lambda model, cache: cache.prefill(prompt(200, seed=9)),
}


@pytest.mark.fault(
    "Processes",
    "Several threads use one cache at once.",
    "The first one's text is right; the others get an error that says to make a cache for each.",
)
@pytest.mark.parametrize("forward", [1, 4, CHUNKS + 1, CHUNKS + 3])
@pytest.mark.parametrize("use", USES)
def test_two_threads_at_once(use: str, forward: int) -> None:
    """While the other is in a chunk, in the last piece, or decodes."""
    model = build("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with held(model.model.layers[1], forward) as gate:
            first = Thread(lambda: ask(model, cache, prompt()))
            assert gate.is_in.wait(PATIENCE)
            with pytest.raises(CakeError, match="Another thread is using this CakeCache; make one for each"):
                USES[use](model, cache)
        found = first.end()
        assert cache.report.chunks_computed == CHUNKS
    assert torch.equal(found, ask(model, DynamicCache(config=model.config), prompt()))


def test_four_threads_at_once() -> None:
    """However they come, one of them is right, and each of the others is told why it is not."""
    model = shared_model("llama")
    expected = {seed: ask(model, DynamicCache(config=model.config), prompt(seed=seed)) for seed in range(4)}
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        threads = [Thread(lambda seed=seed: ask(model, cache, prompt(seed=seed))) for seed in range(4)]
        outcomes = [thread.end() for thread in threads]
    errors = [one for one in outcomes if isinstance(one, BaseException)]
    assert [type(error) for error in errors] == [CakeError] * 3
    assert all(torch.equal(one, expected[n]) for n, one in enumerate(outcomes) if isinstance(one, torch.Tensor))


def test_another_thread_between_two_forwards() -> None:
    """There no part of the model runs, but the first thread will go on."""
    model = shared_model("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        errors: list[Any] = []

        def look(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            errors.append(Thread(lambda: ask(model, cache, prompt(seed=5))).end())
            return torch.zeros(len(ids), dtype=torch.bool)

        found = model.generate(prompt(), **given(cache), **OPTIONS, stopping_criteria=[look])
    assert [type(error) for error in errors] == [CakeError] * 4
    assert torch.equal(found, ask(model, DynamicCache(config=model.config), prompt()))


def test_one_thread_after_another() -> None:
    """Each step of a conversation in a thread of its own, as servers do it."""
    model = shared_model("llama")
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, strategy="load") as cache, torch.no_grad():
        Thread(lambda: cache.prefill(prompt())).end()
        outcome = Thread(lambda: run(model, prompt(), cache)).end()
        assert difference(outcome, oracle(model, prompt())) == ""
        assert cache.report.chunks_loaded == CHUNKS
        steps = [Thread(lambda: model(prompt(1, seed=seed), **given(cache)).logits.shape).end() for seed in range(3)]  # noqa: B023
        assert steps == [(1, 1, 128)] * 3
        assert cache.get_seq_length() == TOKENS + 3 + 3


def test_a_thread_that_was_interrupted_holds_nothing() -> None:
    model = build("llama")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        handle = model.model.layers[1].register_forward_pre_hook(reads_only(interrupt))
        with pytest.raises(KeyboardInterrupt):
            ask(model, cache, prompt())
        handle.remove()
        cache.reset()
        found = Thread(lambda: ask(model, cache, prompt())).end()
        assert torch.equal(found, ask(model, DynamicCache(config=model.config), prompt()))
    assert cache._session.closed


# Closing


@pytest.mark.fault(
    "Time and bounds",
    "A cache is closed, or its `with` block left, while another thread is running a prompt with it.",
    "That prompt is finished and saved, and then the store is closed. Closing does not wait for it.",
)
@pytest.mark.parametrize("forward", [1, 2, 5, CHUNKS, CHUNKS + 1, CHUNKS + 2])
@pytest.mark.parametrize("part", [0, 2])
@pytest.mark.parametrize("copied", [False, True])
def test_closed_in_the_midst_of_a_prompt(forward: int, part: int, copied: bool) -> None:
    model, store = build("llama"), MemoryStore()
    with held(model.model.layers[part], forward) as gate:
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            used = copy.deepcopy(cache) if copied else cache
            thread = Thread(lambda: ask(model, used, prompt()))
            assert gate.is_in.wait(PATIENCE)
        assert cache.closed
        with pytest.raises(CakeError, match="closed"):
            cache.prefill(prompt())
    assert torch.equal(thread.end(), ask(model, DynamicCache(config=model.config), prompt()))
    await_true(lambda: not model._forward_hooks)
    assert used.report.chunks_computed == CHUNKS
    await_true(lambda: len(list(store.keys())) == CHUNKS)


def test_closed_in_the_midst_of_a_prefill() -> None:
    model, store = build("llama"), MemoryStore()
    with held(model.model.layers[0], 3) as gate, CakeCache(model, store, chunk_size=CHUNK) as cache:
        thread = Thread(lambda: cache.prefill(prompt()))
        assert gate.is_in.wait(PATIENCE)
    assert thread.end().chunks_computed == CHUNKS
    await_true(lambda: not model._forward_hooks and len(list(store.keys())) == CHUNKS + 1)  # with the end
    assert torch.equal(ask(model, cache, prompt()), ask(model, DynamicCache(config=model.config), prompt()))


def test_a_prompt_behind_closing_says_that_it_is_closed() -> None:
    model = shared_model("llama")
    cache = CakeCache(model, MemoryStore(), chunk_size=CHUNK)
    cache.close()
    assert torch.equal(ask(model, cache, prompt()), ask(model, DynamicCache(config=model.config), prompt()))
    assert cache.report.reason_code == "closed"
    with pytest.raises(CakeError, match="closed"):
        cache.prefill(prompt())


@pytest.mark.parametrize("warm", [False, True])
def test_a_streamer_in_another_thread_behind_the_with_block(warm: bool) -> None:
    class Numbers:
        """In place of a tokenizer."""

        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(f"{token} " for token in tokens)

    model = build("llama")
    store = filled_store(shared_model("llama")) if warm else MemoryStore()
    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True, timeout=PATIENCE)
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        thread = Thread(lambda: model.generate(prompt(), **given(cache), **OPTIONS, streamer=streamer))
        text = [next(streamer)]
    text += list(streamer)
    found = thread.end()
    assert "".join(text).split() == [str(token) for token in found[0, TOKENS:].tolist()]
    assert torch.equal(found, ask(model, DynamicCache(config=model.config), prompt()))


# Copies


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": pickled,
    "torch.save": saved,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.fault(
    "KV",
    "A cache, or what `generate` returned with it, is pickled, saved or copied.",
    "Pickled it is a plain `DynamicCache` with the same KV; model and store stay behind.",
)
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("what", ["cache", "output"])
@pytest.mark.parametrize("family", here("llama", "gemma3", "falcon_h1", "qwen3_next", "deepseek_v32"))
def test_a_copied_cache_continues_like_the_original(family: str, what: str, way: str) -> None:
    model: Any = family_model(family)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        result = model.generate(prompt(), **given(cache), **OPTIONS, return_dict_in_generate=True)
        copied = COPIES[way](cache) if what == "cache" else cache_of(COPIES[way](result))
        assert type(copied) is (DynamicCache if way in ("pickle", "torch.save") else CakeCache)
        assert copied.get_seq_length() == cache.get_seq_length()
        ids = torch.cat([result.sequences, prompt(9, seed=3)], dim=1)
        mask = {"attention_mask": torch.ones_like(ids)}
        expected = model.generate(ids, **given(copy.deepcopy(cache)), **mask, **OPTIONS)
        assert torch.equal(model.generate(ids, **given(copied), **mask, **OPTIONS), expected)
        if way != "copy":
            assert cache.get_seq_length() == TOKENS + OPTIONS["max_new_tokens"] - 1


@pytest.mark.parametrize("state", ["empty", "closed", "passive"])
def test_pickled_in_other_states(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("llama")
    if state == "passive":
        monkeypatch.setattr(
            "cake_hf.cache.cake_cache.checked_layers", lambda model: ([], Refusal("x", "not understood"))
        )
    cache = CakeCache(model, MemoryStore(), chunk_size=CHUNK)
    if state != "empty":
        ask(model, cache, prompt()[:, :-5])
    cache.close()
    copied = pickled(cache)
    assert type(copied) is DynamicCache
    assert copied.get_seq_length() == cache.get_seq_length()
    ids = torch.cat([prompt()[:, :-5], prompt(30, seed=8)], dim=1)  # goes on from where the pickled one is
    assert torch.equal(ask(model, copied, ids), ask(model, cache, ids))


# Gradients


@pytest.mark.fault(
    "KV", "A prompt comes behind a forward with gradients.", "It goes on as on a `DynamicCache`, and the gradients are right."
)  # fmt: skip
@pytest.mark.parametrize(
    ("family", "then"), [*product(here("llama", "gemma3", "qwen3_next"), ("generate", "forward")), ("llama", "crop")]
)
def test_behind_a_forward_with_gradients(family: str, then: str) -> None:
    """As on a `DynamicCache`, and the graph stays what it was."""
    model: Any = family_model(family)
    found, gradients = [], []
    for cache in (DynamicCache(config=model.config), CakeCache(model, MemoryStore(), chunk_size=CHUNK)):
        loss = model(prompt()[:, :40], **given(cache)).logits.square().sum()
        if then == "crop":
            cache.crop(-7)
        if then == "forward":
            with torch.no_grad():
                found.append(model(prompt()[:, 40:], **given(cache)).logits)
        else:
            found.append(ask(model, cache, prompt()))
        model.zero_grad()
        loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    model.zero_grad()
    assert torch.equal(*found)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
