"""What people give as the model, and as the prompt: each works, or one sentence says what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    CpmAntConfig,
    CpmAntForCausalLM,
    DynamicCache,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

import cake_hf
from cake_hf import CakeCache, MemoryStore, UnsupportedModel
from cake_hf.assets import RECALL_TINY
from models import CHUNK, CHUNKS, build, prompt, shared_model
from naming import given

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
IDS = prompt()


class Wrapper(torch.nn.Module):
    """A module of somebody's around a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class Delegating(Wrapper):
    """It also has what the model has."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(RECALL_TINY)


# Models

WRAPPED: dict[str, Any] = {
    "module": Wrapper,
    "modules": lambda model: Wrapper(Wrapper(model)),
    "delegating module": Delegating,
    "sequential": torch.nn.Sequential,
    "data parallel": torch.nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.fault(
    "Model", "A module around the model is given as the model.", "The one transformers model in it is served."
)
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_model_inside_a_wrapper_is_found(kind: str) -> None:
    model = shared_model("llama")
    with CakeCache(WRAPPED[kind](model), MemoryStore(), chunk_size=CHUNK) as cache:
        assert "LlamaForCausalLM" in repr(cache)
        found = model.generate(IDS, **given(cache), **OPTIONS)
        assert cache.report.chunks_computed == CHUNKS
    assert torch.equal(found, model.generate(IDS, **OPTIONS))


@pytest.mark.parametrize("kind", ["module", "delegating module", "data parallel"])
def test_a_call_of_the_wrapper_is_restored(kind: str) -> None:
    model = shared_model("llama")
    wrapped = WRAPPED[kind](model)
    with CakeCache(wrapped, MemoryStore(), chunk_size=CHUNK) as cache, torch.no_grad():
        wrapped(IDS, **given(cache), logits_to_keep=1)
        assert cache.report.chunks_computed == CHUNKS


@pytest.mark.parametrize("kind", WRAPPED)
def test_generate_with_a_wrapper(kind: str) -> None:
    model = shared_model("llama")
    wrapped = WRAPPED[kind](model)
    if kind in ("module", "modules", "sequential"):  # it may change what the model gives, and has no generate
        with pytest.raises(UnsupportedModel, match="has no generate"):
            cake_hf.generate(wrapped, IDS, store=MemoryStore(), chunk_size=CHUNK, **OPTIONS)
    else:
        found = cake_hf.generate(wrapped, IDS, store=MemoryStore(), chunk_size=CHUNK, **OPTIONS)
        assert torch.equal(found, model.generate(IDS, **OPTIONS))


NO_MODEL: dict[str, tuple[Any, str]] = {
    "name": (lambda: "gpt2", "not its name 'gpt2'; load it"),
    "none": (lambda: None, "not NoneType"),
    "tokenizer": (tokenizer, "needed as the first argument"),
    "config": (lambda: shared_model("llama").config, "not LlamaConfig"),
    "class": (lambda: type(shared_model("llama")), "not the class LlamaForCausalLM"),
    "state dict": (lambda: shared_model("llama").state_dict(), "not OrderedDict"),
    "store": (MemoryStore, "not MemoryStore"),
}


@pytest.mark.fault(
    "Model", "Something else is given as the model: a name, a tokenizer, a class, nothing.", "One sentence says what to give."
)  # fmt: skip
@pytest.mark.parametrize("kind", NO_MODEL)
def test_an_argument_that_is_not_a_model_is_refused(kind: str) -> None:
    make, sentence = NO_MODEL[kind]
    with pytest.raises(TypeError, match=sentence):
        CakeCache(make(), MemoryStore())
    with pytest.raises(TypeError, match=sentence):
        cake_hf.generate(make(), IDS, store=MemoryStore())


@pytest.mark.parametrize("store", ["memory://", None, MemoryStore()])
def test_swapped_arguments(store: Any) -> None:
    with pytest.raises(TypeError, match=r"swapped: the model comes first"):
        CakeCache(store, shared_model("llama"))


def test_modules_without_the_one_model() -> None:
    with pytest.raises(UnsupportedModel, match="there are 0 in it"):
        CakeCache(torch.nn.Linear(2, 2), MemoryStore())
    with pytest.raises(UnsupportedModel, match="there are 2 in it"):
        CakeCache(torch.nn.ModuleList([build("llama"), build("qwen2")]), MemoryStore())
    several = torch.nn.DataParallel(build("llama"))
    several.device_ids = [0, 1]
    with pytest.raises(UnsupportedModel, match=r"copies the model to several devices.*\.module"):
        CakeCache(several, MemoryStore())


HEADS = (LlamaModel, LlamaForSequenceClassification, LlamaForQuestionAnswering, LlamaForTokenClassification)


@pytest.mark.parametrize("kind", HEADS)
def test_models_with_another_head_or_none(kind: Any) -> None:
    """All outputs are wanted: left alone. After `prefill` the rest is as behind a forward of the prefix in chunks."""
    torch.manual_seed(0)
    model, config = kind(shared_model("llama").config).eval(), shared_model("llama").config
    whole = CHUNKS * CHUNK
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache, torch.no_grad():
        found, plain = model(IDS, **given(cache)), model(IDS, **given(DynamicCache(config=config)))
        assert cache.report.reason_code == "all-logits"
        assert all(torch.equal(found[name], plain[name]) for name in tensors_of(plain))
        cache.reset()
        assert cache.prefill(IDS).chunks_computed == CHUNKS
        beside = DynamicCache(config=config)
        for piece in IDS[:, :whole].split(CHUNK, dim=1):
            model(piece, **given(beside))
        found, plain = model(IDS[:, whole:], **given(cache)), model(IDS[:, whole:], **given(beside))
        assert all(torch.equal(found[name], plain[name]) for name in tensors_of(plain))
    with pytest.raises(UnsupportedModel, match=f"{kind.__name__} has no generate"):
        cake_hf.generate(model, IDS, store=MemoryStore())


def tensors_of(output: Any) -> list[str]:
    return [name for name, value in output.items() if isinstance(value, torch.Tensor)]


def test_a_model_that_adds_tokens_of_its_own() -> None:
    config = CpmAntConfig(
        vocab_size=200, hidden_size=32, num_attention_heads=2, dim_head=16, dim_ff=48, num_hidden_layers=2,
        prompt_types=4, prompt_length=4, segment_types=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CpmAntForCausalLM(config).eval()
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        found = model.generate(IDS, **given(cache), **OPTIONS)
        assert cache.report.reason_code == "token-count"
    assert torch.equal(found, model.generate(IDS, **OPTIONS))


# Token ids

GOOD: dict[str, Any] = {
    "list": IDS[0].tolist(),
    "tuple": tuple(IDS[0].tolist()),
    "nested list": IDS.tolist(),
    "one dimension": IDS[0],
    "dict": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
    "encoding": BatchEncoding({"input_ids": IDS.tolist(), "attention_mask": [[1] * IDS.shape[1]]}),
    "array": IDS.numpy(),
    "array of one dimension": IDS[0].numpy().astype(np.int32),
    **{str(dtype): IDS.to(dtype) for dtype in (torch.int32, torch.int16, torch.uint8)},
}


@pytest.mark.fault(
    "Prompt", "Token ids come as a list, an array, an encoding, or in another integer type.", "They are taken as they are."
)  # fmt: skip
@pytest.mark.parametrize("form", GOOD)
def test_forms_of_token_ids(form: str) -> None:
    model = shared_model("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        assert cache.prefill(GOOD[form]).chunks_computed == CHUNKS
        assert torch.equal(model.generate(IDS, **given(cache), **OPTIONS), model.generate(IDS, **OPTIONS))
    if not isinstance(GOOD[form], torch.Tensor):  # a tensor is for `model.generate` itself to judge
        found = cake_hf.generate(model, GOOD[form], store=MemoryStore(), chunk_size=CHUNK, **OPTIONS)
        assert torch.equal(found, model.generate(IDS, **OPTIONS))


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "text": ("Once upon a time", TypeError, "use the tokenizer"),
    "texts": (["Once", "upon"], ValueError, "Token ids are numbers"),
    "none": (None, TypeError, "not None"),
    "number": (5, TypeError, "not int"),
    "floats": (IDS.float(), ValueError, "whole numbers, not torch.float32"),
    "list of floats": ([1.0, 2.0], ValueError, "whole numbers, not torch.float32"),
    "booleans": (IDS > 3, ValueError, "whole numbers, not torch.bool"),
    "ragged": ([[1, 2], [3]], ValueError, "rows of equal length"),
    "three dimensions": (IDS[None], ValueError, r"\[rows, tokens\]"),
    "no dimension": (torch.tensor(5), ValueError, r"\[rows, tokens\]"),
    "padded": ({"input_ids": IDS, "attention_mask": (IDS > 50).long()}, ValueError, "have padding"),
    "other entries": ({"ids": IDS}, ValueError, "no 'input_ids'"),
}


@pytest.mark.fault("Prompt", "What is given to `prefill` are no token ids.", "One sentence says what to give.")
@pytest.mark.parametrize("form", BAD)
def test_an_argument_that_is_not_token_ids_is_refused(form: str) -> None:
    given_ids, error, sentence = BAD[form]
    with CakeCache(shared_model("llama"), MemoryStore(), chunk_size=CHUNK) as cache:
        with pytest.raises(error, match=sentence):
            cache.prefill(given_ids)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("empty", [[], [[]], IDS[:, :0], IDS[0, :0], np.zeros((1, 0))])
def test_a_prompt_without_tokens_is_computed_plainly(empty: Any) -> None:
    with CakeCache(shared_model("llama"), MemoryStore(), chunk_size=CHUNK) as cache:
        assert cache.prefill(empty).reason_code == "short-prompt"
