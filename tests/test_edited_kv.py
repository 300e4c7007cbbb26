"""KV that somebody edited is never saved, and never taken for what the model made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cake_hf import CakeCache, CakeError, MemoryStore
from families import family_model, here
from models import CHUNK, CHUNKS, NEW_TOKENS, build, prompt, run_ahead
from naming import given

FIRST = prompt(CHUNK * CHUNKS)
LONGER = torch.cat([FIRST, prompt(3 * CHUNK + 5, seed=4)], dim=1)
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

Edit = Callable[[Any], None]


def last_token(cache: Any) -> None:
    for layer in cache.layers:
        layer.values[:, :, -1] += 3.0


def last_token_behind_torchs_back(cache: Any) -> None:
    for layer in cache.layers:
        layer.values.data[:, :, -1] += 3.0


def all_by_numpy(cache: Any) -> None:
    cache.layers[1].keys.numpy()[...] *= 1.5


def a_range_of_tokens(cache: Any) -> None:
    cache.layers[0].keys.data[:, :, 20:40] = 0


def one_head(cache: Any) -> None:
    cache.layers[2].values.data[:, 1] = 0


def one_number(cache: Any) -> None:
    cache.layers[0].keys[0, 0, 7, 3] += 1


def replaced(cache: Any) -> None:
    for layer in cache.layers:
        layer.keys = layer.keys * 1.1


def in_inference_mode(cache: Any) -> None:
    with torch.inference_mode():
        cache.layers[0].keys.mul_(2)


EDITS: list[Edit] = [
    last_token, last_token_behind_torchs_back, all_by_numpy, a_range_of_tokens, one_head, one_number, replaced,
    in_inference_mode,
]  # fmt: skip


@pytest.mark.fault(
    "KV",
    "The KV in a cache is edited (in place, through `.data` or numpy, or by replacing it), and generation goes on with it.",
    "The next turn uses the edited KV, as on a `DynamicCache`; nothing of it is saved, and nothing is loaded behind it.",
)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_edited_kv_is_neither_saved_nor_known(edit: Edit, copied: bool) -> None:
    model, store = build("llama"), MemoryStore()
    plain: Any = model.generate  # type: ignore[operator]
    reference = DynamicCache(config=model.config)  # type: ignore[arg-type]
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(LONGER)  # so that there is something behind it that could be loaded
        cache.flush()
    with torch.no_grad(), CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        cache.prefill(FIRST, whole=True)
        for start in range(0, FIRST.shape[1], CHUNK):
            model(FIRST[:, start : start + CHUNK], **given(reference), logits_to_keep=1)
        if copied:
            edit(cache)
            cache = copy.deepcopy(cache)
        else:
            edit(cache)
        edit(reference)
        before = list(store.keys())
        run_ahead(model, LONGER, reference)
        expected = plain(LONGER, **given(reference), **OPTIONS)
        assert torch.equal(plain(LONGER, **given(cache), **OPTIONS), expected)
        cache.flush()
        assert cache.report.chunks_loaded == 0
        assert cache.report.reason_code == "off-schedule"
        assert list(store.keys()) == before


def test_unedited_kv_stays_known() -> None:
    """The negative control, also behind decoding, a crop and a copy."""
    model, store = build("llama"), MemoryStore()
    plain: Any = model.generate  # type: ignore[operator]
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(LONGER)
        cache.flush()
    for change in (lambda cache: None, lambda cache: cache.crop(-2 * CHUNK), copy.deepcopy):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            cache.prefill(FIRST, whole=True)
            cache = change(cache) or cache
            plain(LONGER, **given(cache), **OPTIONS)
            assert cache.report.chunks_loaded > 0
            assert cache.report.reason == ""


def in_place(tensor: torch.Tensor) -> None:
    tensor.mul_(2)


def behind_torchs_back(tensor: torch.Tensor) -> None:
    tensor.numpy()[...] *= 2


def not_at_all(tensor: torch.Tensor) -> None:
    pass


@pytest.mark.fault(
    "KV",
    "A sliding window or a recurrent state is edited after a prompt, in inference mode or behind torch's back.",
    "It is noticed as any other edit: nothing that follows is saved.",
)
@pytest.mark.parametrize("edit", [in_place, behind_torchs_back, not_at_all], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("document", [True, False], ids=["a document", "whole chunks"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("family", here("gemma3", "qwen3_next", "falcon_h1"))
def test_edited_windows_and_states(family: str, mode: Any, document: bool, edit: Callable[[Any], None]) -> None:
    model, store = family_model(family), MemoryStore()
    with mode(), CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(FIRST, whole=not document)
        assert cache.flush(60)
        before = set(store.keys())
        for layer in cache.layers:
            if getattr(layer, "is_sliding", False):
                edit(layer.values)
            for number in range(getattr(layer, "number_of_states", 0)):
                for states in (layer.conv_states, layer.recurrent_states):
                    if states[number] is not None:
                        edit(states[number])
        model.generate(LONGER, **given(cache), **OPTIONS)  # type: ignore[operator]
        assert cache.flush(60)
        assert (cache.report.reason_code == "off-schedule") is (edit is not not_at_all)
        assert (set(store.keys()) == before) is (edit is not not_at_all)


def the_same_document(model: Any, cache: Any) -> None:
    cache.prefill(FIRST, whole=True)


def another_document(model: Any, cache: Any) -> None:
    with pytest.raises(CakeError):
        cache.prefill(prompt(seed=9))


def another_prompt(model: Any, cache: Any) -> None:
    with pytest.raises(CakeError):
        model.generate(prompt(2 * FIRST.shape[1], seed=9), **given(cache), **OPTIONS)


@pytest.mark.fault(
    "KV",
    "KV is edited after a call that brought nothing: `prefill` of what is there, or an error about another prompt.",
    "It is noticed as any other edit.",
)
@pytest.mark.parametrize("edited", [True, False])
@pytest.mark.parametrize("call", [the_same_document, another_document, another_prompt], ids=lambda call: call.__name__)
def test_an_edit_after_a_call_that_brought_nothing(call: Callable[[Any, Any], None], edited: bool) -> None:
    model: Any = build("llama")
    with torch.no_grad(), CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(FIRST, whole=True)
        call(model, cache)
        if edited:
            one_number(cache)
        model.generate(LONGER, **given(cache), **OPTIONS)
        assert (cache.report.reason_code == "off-schedule") is edited
