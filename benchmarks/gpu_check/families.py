"""Tiny random models with all kinds of layers: full attention, windows, and states beside attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.utils import is_flash_attn_2_available

VOCABULARY = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOWED = ["sliding_attention", "sliding_attention", "full_attention"]
STATES = ["linear_attention", "full_attention", "linear_attention"]
DELTA: dict[str, Any] = {
    "layer_types": STATES,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


def tiny_model(family: str, dtype: str, attention: str, device: str, window: int) -> Any:
    """A model of that family, the same each time.

    Args:
        family: a key of what `config_of` knows.
        dtype, device: as torch names them.
        attention: the kernel, as transformers names it.
        window: tokens that windowed layers see.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, window))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # models as small as these would hardly look at what is far away
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    model.set_attn_implementation(attention)
    return model


def config_of(family: str, window: int) -> Any:
    """The family's config.

    Raises:
        ValueError: there is no such family.
    """
    match family:
        case "llama":
            return transformers.LlamaConfig(**COMMON)
        case "qwen3":
            return transformers.Qwen3Config(**COMMON)
        case "gemma3":
            return transformers.Gemma3TextConfig(**COMMON, sliding_window=window, layer_types=WINDOWED)
        case "qwen3_next":
            return transformers.Qwen3NextConfig(**COMMON, **DELTA)
    raise ValueError(f"There is no tiny model of the family {family!r}.")


def runs_here(attention: str, dtype: str, device: str) -> bool:
    """Whether that kernel is installed and takes that dtype."""
    if attention != "flash_attention_2":
        return True
    return device != "cpu" and dtype != "float32" and bool(is_flash_attn_2_available())
