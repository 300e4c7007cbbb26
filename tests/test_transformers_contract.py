"""What we expect of transformers, checked in seconds: where a release breaks it, this fails first and says what is different.

Everything here is read off its classes; no model is run. What they do is compared in test_layer_kinds.py and test_layers.py.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    cache_utils,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cake_hf.cache.guards import GuardedCache
from cake_hf.layers import compat
from models import CHUNK, build, difference, in_chunks_by_hand, oracle, prompt
from old_versions import WRONG_BEFORE

WITHOUT_A_CACHE = {
    "FalconMambaForCausalLM", "Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM", "Mamba2ForCausalLM",
    "MambaForCausalLM", "OpenAIGPTLMHeadModel", "RecurrentGemmaForCausalLM", "ReformerModelWithLMHead", "RwkvForCausalLM",
    "XLMWithLMHeadModel", "XLNetLMHeadModel", "xLSTMForCausalLM",
}  # fmt: skip
"""Decoders that take none, or did not in an older version: they have none, or one of their own for states alone."""

NOT_RESTORED = {"hybrid_sliding", "reference_sliding_attention", "minimax_m3_sparse", "heavily_compressed_attention",
                "compressed_sparse_attention"}  # fmt: skip
"""Layer types that we know of and compute plainly."""

KNOWN = {
    DynamicLayer,
    DynamicSlidingWindowLayer,
    compat.DynamicIndexedLayer,
    compat.LinearAttentionLayer,
    compat.LinearAttentionAndFullAttentionLayer,
    compat.DummyLayer,
}
"""What `ours_for` has a layer for; see test_layer_kinds.py."""

BRINGERS = {"update", "update_indexer", "update_conv_state", "update_recurrent_state"}
"""All methods of a cache by which a model brings content into it. Each has to be guarded (`GuardedCache`)."""


def decoders() -> list[Any]:
    """All classes that `AutoModelForCausalLM` may give."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [one for _, one in MODEL_FOR_CAUSAL_LM_MAPPING.items()]
    return [one for kind in found for one in (kind if isinstance(kind, (tuple, list)) else (kind,))]


@pytest.mark.filterwarnings("ignore")
def test_every_decoder_says_what_it_calls_its_cache() -> None:
    names = {kind.__name__: compat.cache_name(kind.forward) for kind in decoders()}
    assert len(names) > 100
    assert {name for name, called in names.items() if called not in compat.CACHE_NAMES} <= WITHOUT_A_CACHE
    assert {called for called in names.values() if called in compat.CACHE_NAMES} == {compat.generate_name()}


def test_a_dictionary_called_cache_is_none() -> None:
    """The check above can fail: what is called `cache` may be something else, and then it is not ours to fill."""

    def forward(self: Any, input_ids: torch.Tensor, cache: dict[str, torch.Tensor] | None = None) -> None: ...

    assert compat.cache_name(forward) == ""


def test_generate_takes_a_cache_by_a_known_name() -> None:
    assert compat.generate_name() in compat.CACHE_NAMES
    prepare = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert {"input_ids", compat.generate_name()} <= prepare.keys()


def test_every_way_into_a_cache_is_guarded() -> None:
    ways = {name for name in dir(Cache) if name.startswith("update")}
    assert ways <= BRINGERS
    assert {name for name in ways if name not in vars(GuardedCache)} == set()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("update", ["self", "key_states", "value_states", "layer_idx"]),
        ("get_seq_length", ["self", "layer_idx"]),
        ("crop", ["self"]),
        ("reset", ["self"]),
        ("reorder_cache", ["self", "beam_idx"]),
        ("batch_repeat_interleave", ["self", "repeats"]),
        ("batch_select_indices", ["self", "indices"]),
    ],
)
def test_cache_methods_take_the_parameters_we_override(method: str, parameters: list[str]) -> None:
    taken = list(inspect.signature(getattr(Cache, method)).parameters)
    assert taken[: len(parameters)] == parameters


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("lazy_initialization", ["self", "key_states"]),
        ("update", ["self", "key_states", "value_states"]),
        ("get_mask_sizes", ["self"]),
        ("get_seq_length", ["self"]),
        ("crop", ["self"]),
        ("reset", ["self"]),
        ("reorder_cache", ["self", "beam_idx"]),
        ("offload", ["self"]),
        ("prefetch", ["self"]),
    ],
)
def test_layer_methods_take_the_parameters_we_override(method: str, parameters: list[str]) -> None:
    for kind in (DynamicLayer, DynamicSlidingWindowLayer):
        assert list(inspect.signature(getattr(kind, method)).parameters)[: len(parameters)] == parameters


def test_layers_have_the_attributes_we_use() -> None:
    layer = DynamicLayer()
    assert {"keys", "values", "is_initialized"} <= vars(layer).keys()
    layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5))
    assert (tuple(layer.keys.shape), tuple(layer.values.shape), layer.device.type) == (
        (1, 2, 3, 4),
        (1, 2, 3, 5),
        "cpu",
    )
    windowed = DynamicSlidingWindowLayer(sliding_window=8)
    assert (windowed.sliding_window, windowed.cumulative_length) == (8, 0)


def test_a_cache_is_made_from_a_config_with_a_layer_for_each_of_the_models() -> None:
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=3))
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 3
    assert DynamicCache().layers == []


def test_generate_in_chunks_is_forwards_of_the_chunks() -> None:
    """What all parity tests are about, also where windows are shorter than the prompt. Mended before 5.3; see below."""
    ids = prompt(2 * CHUNK + 3)
    windowed = dict(build("mistral").config.to_dict(), sliding_window=CHUNK - 4)  # type: ignore[operator]
    for model in (build("llama"), MistralForCausalLM(MistralConfig(**windowed)).eval()):
        assert difference(oracle(model, ids), in_chunks_by_hand(model, ids)) == ""


def test_generate_in_chunks_is_mended_only_where_it_is_wrong() -> None:
    """docs/versions.md says of which versions it is."""
    mended = getattr(GenerationMixin._prefill, "original", None)
    assert (mended is None) == (Version(transformers.__version__) >= WRONG_BEFORE)
    if mended is None:
        return
    windowed = dict(build("mistral").config.to_dict(), sliding_window=CHUNK - 4)  # type: ignore[operator]
    model, ids = MistralForCausalLM(MistralConfig(**windowed)).eval(), prompt(2 * CHUNK + 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "_prefill", mended)
        assert difference(oracle(model, ids), in_chunks_by_hand(model, ids))


@pytest.mark.filterwarnings("ignore")
def test_every_type_of_layer_is_known() -> None:
    """Those of models come with their modules, which `decoders` imports."""
    decoders()
    types = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {})
    assert {name for name, kind in types.items() if kind not in KNOWN} <= NOT_RESTORED
