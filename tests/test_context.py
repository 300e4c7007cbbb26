"""A chunk's KV must be a function of the tokens up to its end. Models of which that is not so are computed in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

import cake_hf
from cake_hf import MemoryStore, Report
from cake_hf.model import trials
from families import COMMON, FAMILIES, WINDOW
from models import CHUNK, CHUNKS, NEW_TOKENS, prompt
from naming import NAME
from old_versions import OLD

IDS = prompt()
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HALF = 4  # of COMMON's head_dim


def longrope(kind: str, **options: Any) -> Any:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * HALF,
        "long_factor": [4.0] * HALF,
        "original_max_position_embeddings": 64,
    }
    config = getattr(hf, f"{kind}Config")(**{**COMMON, **options}, rope_parameters=rope)
    if kind == "Phi3":
        config.original_max_position_embeddings = 64
    return getattr(hf, f"{kind}ForCausalLM")(config)


def bidirectional_llama() -> Any:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON))
    return both_ways(model)


def both_ways(model: Any) -> Any:
    """Each attention sees all tokens of its forward, whatever the mask says."""
    for layer in model.model.layers:
        attention = layer.self_attn

        class Both(type(attention)):  # type: ignore[misc]
            def forward(
                self, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any
            ) -> Any:
                rows, tokens = hidden_states.shape[:2]
                cache = kwargs.get(NAME)
                past = cache.get_seq_length(self.layer_idx) if cache is not None else 0
                mask = torch.zeros(rows, 1, tokens, past + tokens)
                return super().forward(hidden_states, position_embeddings, mask, **kwargs)

        attention.__class__ = Both
    return model


def encoder_as_decoder() -> Any:
    return hf.BertLMHeadModel(
        hf.BertConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            is_decoder=False, pad_token_id=0,
        )
    )  # fmt: skip


def gemma_both_ways() -> Any:
    config = hf.Gemma3TextConfig(**COMMON, head_dim=8, use_bidirectional_attention=True)
    return hf.Gemma3ForCausalLM(config)


def doge() -> Any:
    return hf.DogeForCausalLM(hf.DogeConfig(**COMMON, keep_window_size=32))


def moshi() -> Any:
    return hf.MoshiForCausalLM(hf.MoshiConfig(**COMMON, sliding_window=32, ffn_dim=48, head_dim=8))


DEPENDENT: dict[str, Callable[[], Any]] = {
    "phi3 with longrope": lambda: longrope("Phi3"),
    "llama with longrope": lambda: longrope("Llama"),
    "qwen2 with longrope": lambda: longrope("Qwen2"),
    "attention both ways": bidirectional_llama,
    "gemma both ways": gemma_both_ways,
    "an encoder": encoder_as_decoder,
    "doge beyond its window": doge,
    "moshi beyond its window": moshi,
}


def built(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def answer(model: Any, store: MemoryStore, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, Report]:
    result = cake_hf.generate(
        model, ids, store=store, chunk_size=CHUNK, strategy="load", return_dict_in_generate=True, **OPTIONS
    )
    cache = getattr(result, NAME, None)
    return result.sequences, cache.report if hasattr(cache, "report") else Report()


@pytest.mark.fault(
    "Model",
    "A model's KV depends on more than the tokens before it (longrope, attention both ways, an odd window).",
    "Its prompts are computed in one piece, and the report says why; found out by trying, once per model.",
)
@pytest.mark.parametrize("name", DEPENDENT)
def test_prompts_are_computed_in_one_piece(name: str) -> None:
    model, store = built(DEPENDENT[name]), MemoryStore()
    plain = model.generate(IDS, **OPTIONS)
    for _ in range(2):
        tokens, report = answer(model, store)
        assert torch.equal(tokens, plain)
        assert report.chunks_loaded == report.chunks_computed == 0
    assert list(store.keys()) == []


RESTORED: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**COMMON, sliding_window=32)),
}
if not OLD:
    RESTORED["doge within its window"] = lambda: hf.DogeForCausalLM(hf.DogeConfig(**COMMON, keep_window_size=2048))


@pytest.mark.parametrize("make", RESTORED.values(), ids=RESTORED)
def test_others_are_restored(make: Callable[[], Any]) -> None:
    """The negative control."""
    model, store = built(make), MemoryStore()
    answer(model, store)
    tokens, report = answer(model, store)
    assert report.chunks_loaded == CHUNKS
    assert torch.equal(
        tokens, model.generate(IDS, **OPTIONS, prefill_chunk_size=CHUNK, **{NAME: DynamicCache(config=model.config)})
    )


def windowed(kind: str) -> Any:
    """A tiny model of a type whose windows are known, with one shorter than the prompt."""
    if (family := kind.removesuffix("_text")) in FAMILIES and trials._window(FAMILIES[family]().config):
        return FAMILIES[family]()
    if kind == "gpt_neo":
        attention = {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
        sizes = {"vocab_size": 128, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
        return hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**sizes, **attention, bos_token_id=1, eos_token_id=2))
    used = {"use_sliding_window": True, "max_window_layers": 0, "head_dim": 8} if kind.startswith("qwen") else {}
    return hf.AutoModelForCausalLM.from_config(hf.CONFIG_MAPPING[kind](**COMMON, **used, sliding_window=WINDOW))


@pytest.mark.skipif(OLD, reason="some of these are not in older versions")
@pytest.mark.parametrize("kind", sorted(trials.WINDOWS_KNOWN))
def test_windows_that_are_known_are_right_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "WINDOWS_KNOWN", frozenset())
    model = built(lambda: windowed(kind))
    assert trials._window(model.config) == WINDOW
    assert not trials.differs_beyond_window(model, WINDOW + 1)


def test_windows_that_are_not_right_are_found_out() -> None:
    """The negative control."""
    assert trials.differs_beyond_window(built(moshi), 33)


# The store vouches for a model: what is in it was saved only after the trial.


def filled(store: MemoryStore, model: Any, **options: Any) -> Report:
    with cake_hf.CakeCache(model, store, chunk_size=CHUNK, strategy="load", **options) as cache:
        report = cache.prefill(IDS)
        assert cache.flush(60)
    return report


ASKED = {
    "the same prompt": IDS,
    "the same beginning": torch.cat([IDS[:, :-1], prompt(1, seed=9)], dim=1),
    "another prompt": torch.cat([prompt(CHUNK, seed=9), IDS], dim=1),
}


@pytest.mark.parametrize(
    ("asked", "exact", "tried"),
    [
        ("the same prompt", True, 0),
        ("the same beginning", True, 0),
        ("another prompt", True, 1),
        ("the same prompt", False, 1),  # its keys say less about the model
    ],
)
def test_the_trial_is_left_out_only_for_chunks_of_the_very_model(
    asked: str, exact: bool, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, models_tried = MemoryStore(), []
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON)).eval()
    filled(store, model, exact=exact)
    again = hf.LlamaForCausalLM(model.config).eval()
    again.load_state_dict(model.state_dict())
    monkeypatch.setattr(trials, "_looks_ahead", lambda model: models_tried.append(model) or False)
    with cake_hf.CakeCache(again, store, chunk_size=CHUNK, strategy="load", exact=exact) as cache:
        assert (cache.prefill(ASKED[asked]).chunks_loaded > 0) is (asked != "another prompt")
    assert models_tried == [again] * tried


def test_a_model_that_looks_ahead_finds_nothing_to_vouch_for_it() -> None:
    """It has the plain model's weights and config; its code is another one, and so are its keys."""
    store, model = MemoryStore(), hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON)).eval()
    assert filled(store, model).restored
    changed = hf.LlamaForCausalLM(model.config).eval()
    changed.load_state_dict(model.state_dict())
    both_ways(changed)
    report = filled(store, changed)
    assert report.restored == 0
    assert report.reason_code == "looks-ahead"
