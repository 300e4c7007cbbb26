"""Whatever leaves a forward half way, and wherever: afterwards the cache holds what it held before, and says so."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cake_hf import CakeCache, MemoryStore, reads_only
from families import FAMILIES as BUILDERS
from models import CHUNK, CHUNKS, NEW_TOKENS, build, prompt
from naming import given
from old_versions import OLD
from stored import filled_store

IDS = prompt()
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Panic(BaseException):
    """As those of extensions in Rust: no `Exception`."""


@contextmanager
def raising(module: Any, error: type[BaseException], forward: int) -> Iterator[None]:
    """In that run of the module, counted from 1."""
    runs = 0

    def hook(*_: object) -> None:
        nonlocal runs
        runs += 1
        if runs == forward:
            raise error("in the middle")

    handle = module.register_forward_pre_hook(reads_only(hook))
    try:
        yield
    finally:
        handle.remove()


def answer(model: Any, cache: Any, **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(IDS, **given(cache), **OPTIONS, **options)
    return tokens


def expected(model: Any) -> torch.Tensor:
    return answer(model, DynamicCache(config=model.config), prefill_chunk_size=CHUNK)


@pytest.mark.fault(
    "KV",
    "A forward is left half way: Ctrl-C, an alarm, an error, in a chunk, in the last piece, or while tokens are decoded.",
    "The cache holds what it held before that forward, and the same call again gives the right tokens.",
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Panic, RuntimeError, TimeoutError])
@pytest.mark.parametrize("strategy", ["load", "compute", "both"])
@pytest.mark.parametrize("forward", [1, 2, 3])
def test_the_same_call_again_gives_the_right_tokens(error: type[BaseException], strategy: str, forward: int) -> None:
    model: Any = build("llama")
    tokens, store = expected(model), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cold:
        cold.prefill(IDS)
    with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as cache:
        with raising(model.model.layers[1], error, forward), pytest.raises(error):
            answer(model, cache)
        held = cache.get_seq_length()
        assert all(layer.get_seq_length() == held for layer in cache.layers)
        if held:  # it decoded already
            cache.reset()
        assert torch.equal(answer(model, cache), tokens)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 2])
def test_a_decoding_step_that_is_left_is_as_if_it_had_not_begun(layer: int, step: int) -> None:
    model: Any = build("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK, strategy="compute") as cache, torch.no_grad():
        model(IDS, **given(cache), logits_to_keep=1)
        model(IDS[:, :1], **given(cache))
        length, kept = cache.get_seq_length(), [each.keys.clone() for each in cache.layers]
        for _ in range(1, step):
            model(IDS[:, :1], **given(cache))
        with raising(model.model.layers[layer], KeyboardInterrupt, 1), pytest.raises(KeyboardInterrupt):
            model(IDS[:, :1], **given(cache))
        assert cache.get_seq_length() == length + step - 1
        assert all(torch.equal(each.keys[:, :, :length], keys) for each, keys in zip(cache.layers, kept, strict=True))
        assert len({each.get_seq_length() for each in cache.layers}) == 1


@pytest.mark.parametrize("family", ["mistral", "gemma3", *([] if OLD else ["qwen3_next", "lfm2"])])
@pytest.mark.parametrize("turn", ["prompt", "decoding"])
def test_windows_and_states(family: str, turn: str) -> None:
    """Windows go back; of states, which are written over with each token, nothing is left, and all is computed again."""
    torch.manual_seed(0)
    model = BUILDERS[family]().eval()
    tokens, store = expected(model), filled_store(model, IDS)
    layers = model.model.layers
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        with raising(layers[-1], KeyboardInterrupt, 1 if turn == "prompt" else 3), pytest.raises(KeyboardInterrupt):
            answer(model, cache)
        held = cache.get_seq_length()
        assert held in ((0,) if turn == "prompt" else (0, IDS.shape[1] + 1))
        if held:
            cache.reset()
        assert torch.equal(answer(model, cache), tokens)


def test_a_plain_prompt_goes_back_too() -> None:
    """One that is not restored, since somebody else's hook is on the model."""
    model: Any = build("llama")
    tokens = answer(model, DynamicCache(config=model.config))
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with raising(model.model.layers[2], KeyboardInterrupt, 1), pytest.raises(KeyboardInterrupt):
            answer(model, cache)
        assert cache.get_seq_length() == 0
        assert torch.equal(answer(model, cache), tokens)
    handle.remove()


def test_a_turn_that_is_left_leaves_the_turns_before_it() -> None:
    model: Any = build("llama")
    more = torch.cat([IDS, prompt(40, seed=5)], dim=1)
    plain = DynamicCache(config=model.config)
    answer(model, plain, prefill_chunk_size=CHUNK)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(IDS)
        held = cache.get_seq_length()
        with raising(model.model.layers[2], KeyboardInterrupt, 2), pytest.raises(KeyboardInterrupt):
            model.generate(more, **given(cache), **OPTIONS)
        assert cache.get_seq_length() == held == CHUNK * CHUNKS
        tokens = model.generate(more, **given(cache), **OPTIONS)
    assert torch.equal(tokens, model.generate(more, **OPTIONS, prefill_chunk_size=CHUNK))


def test_a_copy_of_a_cache_that_was_left_holds_no_half_forward() -> None:
    model: Any = build("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with raising(model.model.layers[2], KeyboardInterrupt, CHUNKS + 1), pytest.raises(KeyboardInterrupt):
            answer(model, cache)
        assert copy.deepcopy(cache).get_seq_length() == 0


@pytest.mark.fault(
    "Time and bounds",
    "A watchdog of the user's raises out of a signal handler.",
    "Its error comes through, as what it is.",
)
@pytest.mark.parametrize("error", [TimeoutError, Panic])
def test_an_alarm_in_a_forward_leaves_the_cache_usable(error: type[BaseException]) -> None:
    model: Any = build("llama")

    def alarm(*_: object) -> None:
        raise error("too slow")

    def ring(*_: object) -> None:
        signal.raise_signal(signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, alarm)
    handle = model.model.layers[1].register_forward_pre_hook(reads_only(ring))
    try:
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
            with pytest.raises(error, match="too slow"):
                answer(model, cache)
            handle.remove()
            assert torch.equal(answer(model, cache), expected(model))
    finally:
        signal.signal(signal.SIGALRM, before)


def everywhere(model: Any) -> list[Callable[[], Any]]:
    return [lambda: model.model.embed_tokens, lambda: model.model.norm, lambda: model.lm_head]


@pytest.mark.parametrize("place", range(3))
def test_before_the_first_layer_and_behind_the_last_one(place: int) -> None:
    model: Any = build("llama")
    tokens = expected(model)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK, strategy="compute") as cache:
        for forward in (1, CHUNKS, CHUNKS + 1):
            with raising(everywhere(model)[place](), KeyboardInterrupt, forward), pytest.raises(KeyboardInterrupt):
                answer(model, cache)
            assert cache.get_seq_length() == 0
        assert torch.equal(answer(model, cache), tokens)
