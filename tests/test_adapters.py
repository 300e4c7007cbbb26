"""Adapters and quantised weights: each state of a model has chunks of its own, and each gives what it gives without a store."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from cake_hf import CakeCache, MemoryStore
from cake_hf.model.fingerprint import weights_digest
from cake_hf.model.weights import unknown_weights
from models import CHUNK, CHUNKS, build, difference, oracle, prompt, run
from naming import given
from snippets import MODEL as SMALL

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def adapted() -> Any:
    """A model with two adapters, of which the first one is active."""
    torch.manual_seed(5)
    model = get_peft_model(build("llama"), LORA, adapter_name="first")
    model.add_adapter("second", LORA)
    return model.eval()


def found(model: Any, store: MemoryStore) -> int:
    """How many chunks of the prompt are loaded; checks the result against a `DynamicCache`, and saves what is missing."""
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as used:
        outcome = run(model, prompt(), used)
        assert used.report.chunks_loaded + used.report.chunks_computed == CHUNKS
        loaded = used.report.chunks_loaded
    assert difference(outcome, oracle(model, prompt())) == ""
    return loaded


def test_every_state_of_the_adapters_has_chunks_of_its_own() -> None:
    """`generate` of the PEFT model itself, with one cache class for all states."""
    model, store, first_tokens = adapted(), MemoryStore(), []
    for turn in range(2):
        loaded = []
        for switch in ("first", "second", ["first", "second"]):
            model.base_model.set_adapter(switch)
            loaded.append(found(model, store))
            first_tokens.append(
                str(run(model, prompt(), None if turn else CakeCache(model, store, chunk_size=512)).tokens)
            )
        with model.disable_adapter():
            loaded.append(found(model, store))
        assert loaded == [turn * CHUNKS] * 4
    assert len(list(store.keys())) == 4 * CHUNKS
    assert len(set(first_tokens)) > 1, "adapters that change nothing would show nothing"


def test_adapters_count_by_what_is_loaded_and_by_name() -> None:
    """Also where they are disabled, or not active."""
    model, store = adapted(), MemoryStore()
    with model.disable_adapter():
        assert found(model, store) == 0
    assert found(build("llama"), store) == 0
    assert found(model, store) == 0
    for name, others in (("first", ()), ("renamed", ("second",))):
        torch.manual_seed(5)
        other = get_peft_model(build("llama"), LORA, adapter_name=name)
        for another in others:
            other.add_adapter(another, LORA)
        assert found(other.eval(), store) == 0
    assert found(adapted(), store) == CHUNKS


def test_scaled_merged_and_unmerged() -> None:
    model, store = adapted(), MemoryStore()
    assert found(model, store) == 0
    model.merge_adapter(["first"])
    assert found(model, store) == 0, "changed weights are another model"
    assert found(model, store) == CHUNKS
    model.unmerge_adapter()
    outcome = run(model, prompt(), CakeCache(model, store, chunk_size=CHUNK))
    assert difference(outcome, oracle(model, prompt())) == "", "whether it hits depends on how the weights are rounded"
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("first", 0.25)
    assert found(model, store) == 0
    assert found(model, store) == CHUNKS


def test_merged_for_good_it_is_a_plain_model() -> None:
    merged, store = adapted().merge_and_unload(), MemoryStore()
    assert found(merged, store) == 0
    assert found(adapted().merge_and_unload(), store) == CHUNKS
    assert found(build("llama"), store) == 0


def test_one_cache_goes_through_a_switch() -> None:
    model, store = adapted(), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as used:
        for switch in ("first", "second", "first"):
            model.set_adapter(switch)
            used.reset()
            assert difference(run(model, prompt(), used), oracle(model, prompt())) == ""
        assert used.report.chunks_loaded == CHUNKS


def test_a_batch_with_an_adapter() -> None:
    model, store = adapted(), MemoryStore()
    inputs = torch.cat([prompt(), prompt(seed=2)])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(input_ids=inputs, **options)
    for turn in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as used:
            assert torch.equal(model.generate(input_ids=inputs, **given(used), **options), plain)
            assert used.report.chunks_loaded == turn * 2 * CHUNKS


def test_adapters_chosen_row_by_row_are_computed() -> None:
    """`adapter_names` is in no argument that the model itself gets: nothing may be stored, or loaded, for it."""
    model, store = adapted(), MemoryStore()
    assert found(model, store) == 0
    before = sorted(store.keys())
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for ids, names in ((prompt(), ["second"]), (prompt().repeat(2, 1), ["first", "second"])):
        plain = model.generate(input_ids=ids, adapter_names=names, **options)
        with CakeCache(model, store, chunk_size=CHUNK) as used:
            assert torch.equal(model.generate(input_ids=ids, adapter_names=names, **given(used), **options), plain)
            assert used.report.reason_code == "mixed-adapters"
    assert sorted(store.keys()) == before
    assert found(model, store) == CHUNKS


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_learnt_prompts_are_computed() -> None:
    """They come in front of the prompt, as embeddings."""
    torch.manual_seed(5)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, store = get_peft_model(build("llama"), config).eval(), MemoryStore()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(input_ids=prompt(), **options)
    with CakeCache(model, store, chunk_size=CHUNK) as used:
        assert torch.equal(model.generate(input_ids=prompt(), **given(used), **options), plain)
        assert used.report.reason
    assert list(store.keys()) == []


# Quantised weights.


def packed(model: torch.nn.Module) -> torch.nn.Module:
    """torch's own: the weights are no parameters any more, but packed objects of the modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, which is not always there
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


class Int8(torch.Tensor):
    """Weights as torchao keeps them: a tensor that is made of two others."""

    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values_, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values_", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> Int8:
        return Int8(parts["values_"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Int8(args[0].values_, args[0].scale)
        plain = [arg.values_ * arg.scale if isinstance(arg, Int8) else arg for arg in args]
        return function(*plain, **(kwargs or {}))


def made_of_parts(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.detach().abs().amax() / 127
            values = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = torch.nn.Parameter(Int8(values, scale), requires_grad=False)
    return model


def other_weights() -> torch.nn.Module:
    """As `build("llama")`, but for one matrix, turned round: the same scales, other numbers."""
    model = build("llama")
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.copy_(-weight)
    return model


@pytest.mark.parametrize("quantise", [packed, made_of_parts])
def test_quantised_weights(quantise: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    store = MemoryStore()
    assert found(quantise(build("llama")), store) == 0
    assert found(quantise(build("llama")), store) == CHUNKS
    assert found(quantise(other_weights()), store) == 0
    assert found(build("llama"), store) == 0


def test_a_change_of_quantised_weights_is_noticed() -> None:
    model = made_of_parts(build("llama"))
    first = weights_digest(model)
    model.model.layers[1].mlp.up_proj.weight.values_.neg_()
    assert weights_digest(model) != first
    model = packed(build("llama"))
    first, other = weights_digest(model), packed(other_weights())
    model.model.layers[0].mlp.up_proj = other.model.layers[0].mlp.up_proj
    assert weights_digest(model) == weights_digest(other) != first


def test_weights_that_cannot_be_told_are_computed() -> None:
    model, store = build("llama"), MemoryStore()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().to_sparse(), requires_grad=False)
    assert unknown_weights(model) == "Parameter"
    assert unknown_weights(made_of_parts(build("llama"))) == ""
    with CakeCache(model, store, chunk_size=CHUNK) as used:
        assert used._model_refusal.code == "weight-format"


class Coarse(torch.nn.Linear):
    """Rounds its weights in each forward only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


def test_the_same_weights_in_modules_of_another_kind() -> None:
    store = MemoryStore()
    assert found(build("llama"), store) == 0
    for expected in (0, CHUNKS):
        model = build("llama")
        for layer in model.model.layers:
            layer.mlp.up_proj.__class__ = Coarse
        assert weights_digest(model) == weights_digest(build("llama"))
        assert found(model, store) == expected


def by_torchao(model: torch.nn.Module) -> torch.nn.Module:
    """Weights as 8-bit integers, each row with a scale of its own; computed in the model's dtype."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def by_bitsandbytes(model: torch.nn.Module) -> torch.nn.Module:
    """Its layers in the place of torch's. The weights stay as they are, and are quantised in each forward."""
    import bitsandbytes

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                small = bitsandbytes.nn.Linear8bitLt(child.in_features, child.out_features, bias=False)
                small.load_state_dict(child.state_dict())
                setattr(module, name, small.to("cpu"))
    return model


PACKAGES = {"torchao": by_torchao, "bitsandbytes": by_bitsandbytes}


@pytest.mark.parametrize("package", PACKAGES)
def test_weights_quantised_by_a_package(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    quantise, store = PACKAGES[package], MemoryStore()
    assert found(quantise(build("llama")), store) == 0
    assert found(quantise(build("llama")), store) == CHUNKS
    assert found(quantise(other_weights()), store) == 0
    assert found(build("llama"), store) == 0


def in_torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


LOADED: dict[str, tuple[str, Callable[[], Any]]] = {
    "torchao": ("torchao", in_torchao),
    "8 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "4 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True)),
}


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt")
@pytest.mark.parametrize("way", LOADED)
def test_a_model_that_is_loaded_quantised(way: str) -> None:
    """As the page about quantised models shows it."""
    package, config = LOADED[way]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    store = MemoryStore()

    def load(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.bfloat16, **options)

    assert found(load(quantization_config=config()), store) == 0
    assert found(load(quantization_config=config()), store) == CHUNKS
    assert found(load(), store) == 0
