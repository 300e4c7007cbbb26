"""Every family of models that is looked after, as a tiny random model made from its config.

Each is as small as its structure allows, and has all kinds of layers that its large relatives have: windows shorter than the
prompt, states beside attention, layers that share what others keep.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf
from packaging.version import Version

from cake_hf.layers.compat import takes_dynamic_cache
from cake_hf.layers.kinds import is_ours
from cake_hf.restore.support import layers_for, model_refusal
from models import VOCABULARY

WINDOW = 24
"""Tokens that a windowed layer sees: more than a chunk, no multiple of one, and far less than the prompt.

Also how many an indexer chooses. It has heads enough that hardly any two tokens score alike: which of these comes first
depends on how a prompt is cut.
"""

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD_NAMES = Version(hf.__version__) < Version("5.11")
"""Whether hybrids have names of their own for kinds of layers."""

_PLAIN = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_DELTA = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


def _of(name: str, **config: Any) -> Callable[[], Any]:
    """The causal model class and the config class of that name."""
    return lambda: getattr(hf, f"{name}ForCausalLM")(_config(name, config))


def _config(name: str, config: dict[str, Any]) -> Any:
    return (getattr(hf, f"{name}TextConfig", None) or getattr(hf, f"{name}Config"))(**config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _of("Llama", **COMMON),
    "qwen2": _of("Qwen2", **COMMON),
    "qwen3": _of("Qwen3", **COMMON, head_dim=16),
    "qwen3_moe": _of("Qwen3Moe", **COMMON, **_EXPERTS, head_dim=8),
    "mistral": _of("Mistral", **COMMON, sliding_window=WINDOW),
    "mixtral": _of("Mixtral", **COMMON, num_local_experts=4, sliding_window=None),
    "gemma2": _of("Gemma2", **COMMON, head_dim=8, sliding_window=WINDOW),
    "gemma3": _of(
        "Gemma3",
        **{**COMMON, "num_hidden_layers": 3},
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3n": _of(
        "Gemma3n",
        **{**COMMON, "num_hidden_layers": 4, "intermediate_size": [48] * 4},
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
        altup_num_inputs=2,
    ),
    "gemma4": _of(
        "Gemma4",
        **{**COMMON, "num_hidden_layers": 4},
        head_dim=8,
        global_head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
    ),
    "gpt_oss": _of(
        "GptOss",
        **COMMON,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": _of("Phi3", **COMMON, sliding_window=None),
    "olmo2": _of("Olmo2", **COMMON),
    "cohere2": _of("Cohere2", **COMMON, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "granite": _of("Granite", **COMMON),
    "falcon": _of("Falcon", **{n: v for n, v in _PLAIN.items() if n != "intermediate_size"}, ffn_hidden_size=48),
    "gpt_neox": _of("GPTNeoX", **_PLAIN),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT)),
    "bloom": _of("Bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
    "deepseek_v3": _of("DeepseekV3", **{**COMMON, **_LATENT}),
    "deepseek_v32": _of("DeepseekV32", **{**COMMON, **_LATENT}, index_n_heads=8, index_head_dim=16, index_topk=WINDOW),
    "glm_moe_dsa": _of("GlmMoeDsa", **{**COMMON, **_LATENT}, index_n_heads=8, index_head_dim=16, index_topk=WINDOW),
    "llama4": _of(
        "Llama4",
        **COMMON,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "qwen3_next": _of("Qwen3Next", **{**COMMON, **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16}),
    "qwen3_5": _of("Qwen3_5", **{**COMMON, **_DELTA}),
    "jamba": _of(
        "Jamba",
        **{**COMMON, "num_hidden_layers": 3},
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "mamba2": _of(
        "Mamba2",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
    "lfm2": _of(
        "Lfm2",
        **{**COMMON, "num_hidden_layers": 3},
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
    ),
    "granitemoehybrid": _of(
        "GraniteMoeHybrid",
        **{**COMMON, "num_hidden_layers": 3},
        **_MAMBA,
        layer_types=["mamba", "attention", "mamba"]
        if OLD_NAMES
        else ["linear_attention", "full_attention", "linear_attention"],
        shared_intermediate_size=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        position_embedding_type="rope",
    ),
    "falcon_h1": _of("FalconH1", **{**COMMON, "head_dim": 8}, **_MAMBA, mamba_d_ssm=64),
    "nemotron_h": _of(
        "NemotronH",
        **{**COMMON, "num_hidden_layers": 4},
        head_dim=8,
        layers_block_type=["mamba", "attention", "mlp", "mamba"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=8,
        use_mamba_kernels=False,
    ),
}


@cache
def exists(family: str) -> bool:
    """Whether the installed transformers has that family. On versions since 5.17 it has all of them."""
    try:
        torch.manual_seed(0)
        FAMILIES[family]()
    except Exception:  # transformers has no such class, or does not know the config
        if Version(hf.__version__) >= Version("5.17"):
            raise
        return False
    return True


@cache
def is_here(family: str) -> bool:
    """Whether the installed transformers has that family, and keeps for it what can be restored."""
    if not exists(family):
        return False
    model = FAMILIES[family]()
    layers = layers_for(model)
    return takes_dynamic_cache(model) and all(map(is_ours, layers)) and model_refusal(model, layers) is None


def here(*families: str) -> list[str]:
    """Those of the families for which the installed transformers has all that it takes; on versions since 5.17 each of them."""
    found = [family for family in families if is_here(family)]
    assert len(found) == len(families) or Version(hf.__version__) < Version("5.17"), set(families) - set(found)
    return found


@cache
def family_model(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The family's model, the same in every process. Leave it as it is."""
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype).eval()
    assert isinstance(model, torch.nn.Module)
    remember_more(model)
    return model


def remember_more(model: torch.nn.Module) -> None:
    """Let every layer count, and states last: as they are initialised, models as small as these forget within a few tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-5, -1)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.fill_(-2)
            elif parameter.ndim > 1:
                parameter.mul_(4)
