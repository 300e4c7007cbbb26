"""Trials of a model, each run once: whether the KV of tokens depends only on these tokens and on the preceding ones.

A restore relies on that. Configs and classes do not always tell, so the model is run on a few tokens: in one piece and in
two, with more tokens after them, and with states carried over a cut.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from cake_hf.layers.compat import LinearAttentionLayer
from cake_hf.layers.recurrent import states_of
from cake_hf.model.kv_layout import differ, run_aside, some_tokens
from cake_hf.model.look import has, modules_of
from cake_hf.model.vision import family_of
from cake_hf.util.forks import Lock

STATE_TOLERANCE = 0.05
STATE_TOLERANCE_FLOAT32 = 0.01  # allows for TF32
LOGITS_TOLERANCE = 0.2
KV_TOLERANCE = 0.05
WINDOW_TOLERANCE = 0.03
WINDOW_TOLERANCE_FLOAT32 = 0.001
"""Relative differences: far above the effect of rounding, far below that of a lost state or of attention to later tokens."""

SHORT = 4
"""Tokens of a prompt whose KV is computed alone, and with the same number of tokens after it."""
BEYOND_WINDOW = 24
"""Tokens by which a trial is longer than the window."""

WINDOWS_KNOWN = frozenset((
    "cohere2", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gpt_neo", "gpt_oss",
    "llama4", "llama4_text", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
))  # fmt: skip
"""Model types that `tests/test_context.py` tests beyond their window; others are tried at their first longer prompt."""

_verdicts: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()
_lock = Lock()


def forgets(model: torch.nn.Module) -> bool:
    """Returns whether a model with recurrent states loses them at a cut of the prompt.

    Some transformers models restart in every forward of more than one token. They give different results for pieces than for
    the whole prompt, whatever the cache.
    """
    return _once(model, "forgets", _loses_state)


def differs_in_pieces(model: torch.nn.Module) -> bool:
    """Returns whether a model's logits for a short prompt in two pieces differ, by more than rounding, from those in one."""
    return _once(model, "differs in pieces", _differs, keeps=False)


def looks_ahead(model: torch.nn.Module) -> bool:
    """Returns whether the KV of a prompt's first tokens changes if more tokens follow.

    It does with bidirectional attention, and if frequencies depend on the length of the whole input.
    """
    return _once(model, "looks ahead", _looks_ahead, keeps=False)


def differs_beyond_window(model: torch.nn.Module, tokens: int) -> bool:
    """Returns whether a prompt of that many tokens exceeds a window that the config names, and then differs in pieces."""
    window = _window(model.config)
    if not window or tokens <= window or getattr(model.config, "model_type", "") in WINDOWS_KNOWN:
        return False
    return _once(model, "differs beyond its window", lambda model: _differs_beyond(model, window))


def _once(model: torch.nn.Module, what: str, trial: Callable[[Any], bool], *, keeps: bool = True) -> bool:
    """Returns a trial's remembered verdict on a model, or runs the trial.

    Args:
        model: any model.
        what: names the subject of the trial.
        trial: returns whether something is wrong.
        keeps: whether to remember a bad verdict, too. If not, as for short trials, the trial is repeated: the model may have
            been patched when it ran.
    """
    with _lock:
        verdicts = _verdicts.setdefault(model, {})
        if what in verdicts:
            return verdicts[what]
        wrong = trial(model)
        if keeps or not wrong:
            verdicts[what] = wrong
        return wrong


def forget_trials(model: torch.nn.Module) -> None:
    """Forgets the verdicts on a model that turned out to have been changed."""
    with _lock:
        _verdicts.pop(model, None)


def _window(config: Any) -> int:
    """Returns the smallest window that a config names; 0 if it names none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("sliding_window", "keep_window_size", "attention_window_size", "window_size", "attention_chunk_size")
    found = [getattr(text, name, None) for name in names]
    return min((size for size in found if isinstance(size, int) and size > 0), default=0)


def _differs(model: Any) -> bool:
    return differ(*_logits_whole_and_cut(model, 16, 18), LOGITS_TOLERANCE)


def _differs_beyond(model: Any, window: int) -> bool:
    whole, cut = _logits_whole_and_cut(model, window + BEYOND_WINDOW // 2, window + BEYOND_WINDOW)
    return differ(whole, cut, WINDOW_TOLERANCE_FLOAT32 if whole.dtype == torch.float32 else WINDOW_TOLERANCE)


def _looks_ahead(model: Any) -> bool:
    # In an untrained model, attention is too weak for the trial below to detect it.
    if any(getattr(module, "is_causal", True) is False and has(module, "layer_idx") for _, module in modules_of(model)):
        return True
    ids = some_tokens(model, 2 * SHORT, 7)
    near = torch.arange(SHORT, device=ids.device)
    positions = torch.cat([near, near + _beyond_context(model)]).unsqueeze(0) if family_of(model) is None else None
    alone = run_aside(model, [ids[:, :SHORT]])[1]
    followed = run_aside(model, [ids], positions=positions)[1]
    return any(
        differ(few, many[:, :, :SHORT], KV_TOLERANCE)
        for one, other in zip(alone, followed, strict=True)
        for few, many in zip(_attention_of(one), _attention_of(other), strict=True)
        if few.numel() and many.shape[2] == 2 * SHORT
    )


def _attention_of(layer: Any) -> list[torch.Tensor]:
    """Returns a layer's K and V, `[1, heads, tokens, head_dim]` each."""
    kept = [getattr(layer, name, None) for name in ("keys", "values")]
    return [tensor for tensor in kept if isinstance(tensor, torch.Tensor)]


def _beyond_context(model: Any) -> int:
    """Returns a position beyond a model's original context, if its config names one, and within its maximum."""
    text = model.config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    most = most if isinstance(most, int) else SHORT
    original = getattr(text, "original_max_position_embeddings", None)
    for rope in (getattr(text, "rope_parameters", None), getattr(text, "rope_scaling", None)):
        if isinstance(rope, dict):
            original = original or rope.get("original_max_position_embeddings")
    return max(SHORT, min(most, 2 * original if isinstance(original, int) else most) - SHORT)


def _logits_whole_and_cut(model: Any, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = some_tokens(model, tokens, 7)
    return run_aside(model, [ids])[0], run_aside(model, [ids[:, :first], ids[:, first:]])[0]


def _loses_state(model: Any) -> bool:
    ids = some_tokens(model, 18, 7)
    whole, cut = run_aside(model, [ids]), run_aside(model, [ids[:, :16], ids[:, 16:]])
    # Of the first such layer: its input is the same in both runs, so it shows no other difference.
    first = next(n for n, layer in enumerate(whole[1]) if isinstance(layer, LinearAttentionLayer))
    states = [states_of(layers[first]) for _, layers in (whole, cut)]
    recurrent = [name for name in states[0] if name.startswith("recurrent")]
    if not recurrent:  # a short convolution: its loss shows only in later results
        return differ(whole[0], cut[0], LOGITS_TOLERANCE)
    is_float32 = model.get_input_embeddings().weight.dtype == torch.float32
    tolerance = STATE_TOLERANCE_FLOAT32 if is_float32 else STATE_TOLERANCE
    return any(differ(states[0][name], states[1][name], tolerance) for name in recurrent)
