"""Tiny random models, one per family, and the oracle that every restored prompt is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from naming import cache_of, given
from old_versions import mend_chunked_prefill

mend_chunked_prefill()
torch.set_num_threads(1)  # models this small are slower on more threads, and far slower on a busy machine

CHUNK = 16
CHUNKS = 8
TAIL = 7
NEW_TOKENS = 4
VOCABULARY = 128

_GQA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MHA = {name: value for name, value in _GQA.items() if name != "num_key_value_heads"}

FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GQA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GQA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GQA, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GQA, sliding_window=None)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_MHA)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Outcome:
    """What a generation gave: tokens, the logits of each new token, and the KV at the end."""

    tokens: torch.Tensor
    logits: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def build(family: str, dtype: str = "float32", attention: str = "sdpa", seed: int = 0) -> torch.nn.Module:
    """A new random model, the same for equal arguments."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().to(DTYPES[dtype]).eval()
    model.set_attn_implementation(attention)
    return model


@cache
def shared_model(family: str, dtype: str = "float32", attention: str = "sdpa") -> torch.nn.Module:
    """As `build`, kept for the whole run: for tests that leave the model as it is."""
    return build(family, dtype, attention)


def prompt(tokens: int = CHUNK * CHUNKS + TAIL, seed: int = 1) -> torch.Tensor:
    """`[1, tokens]` random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def run(model: torch.nn.Module, ids: torch.Tensor, cache: Any, **options: Any) -> Outcome:
    """Greedy generation of NEW_TOKENS tokens with that cache."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **options}
    result = model.generate(
        ids, **given(cache), return_dict_in_generate=True, output_logits=True, pad_token_id=0, **options
    )
    layers = cache_of(result).layers
    return Outcome(
        result.sequences,
        torch.stack(result.logits),
        [layer.keys.clone() for layer in layers],
        [layer.values.clone() for layer in layers],
    )


def oracle(model: torch.nn.Module, ids: torch.Tensor, **options: Any) -> Outcome:
    """The law's reference: chunked prefill on a `DynamicCache`."""
    return run(model, ids, DynamicCache(config=model.config), prefill_chunk_size=CHUNK, **options)


@cache
def expected(family: str = "llama", dtype: str = "float32", attention: str = "sdpa") -> Outcome:
    """What the oracle gives for `prompt()` on the shared model."""
    return oracle(shared_model(family, dtype, attention), prompt())


def in_chunks_by_hand(model: Any, ids: torch.Tensor) -> Outcome:
    """The reference without `prefill_chunk_size`: forwards of the chunks, then `generate` on what they left."""
    used = DynamicCache(config=model.config)
    run_ahead(model, ids, used)
    return run(model, ids, used)


def run_ahead(model: torch.nn.Module, ids: torch.Tensor, cache: DynamicCache) -> None:
    """Run what is new of `ids` in chunks, but for the last piece: for any turn, what `prefill_chunk_size` does for the first.

    (Of a cache that goes on, older versions of transformers run everything again where that is given.)
    """
    past = cache.get_seq_length()
    with torch.no_grad():
        for start in range(past, ids.shape[1] - CHUNK, CHUNK):
            end = start + CHUNK
            mask = torch.ones_like(ids[:, :end])
            model(ids[:, start:end], attention_mask=mask, **given(cache), logits_to_keep=1)


def difference(one: Outcome, other: Outcome) -> str:
    """The first thing in which two outcomes are not bit for bit equal; empty if there is none."""
    if not torch.equal(one.tokens, other.tokens):
        return "tokens"
    if not torch.equal(one.logits, other.logits):
        return "logits"
    for number, pair in enumerate(zip(one.keys + one.values, other.keys + other.values, strict=True)):
        if not torch.equal(*pair):
            return f"KV tensor {number}"
    return ""
