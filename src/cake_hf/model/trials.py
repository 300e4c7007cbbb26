"""Trials of a model, once each: whether its KV of some tokens depends on those tokens and what precedes them alone.

A restore relies on that. Configs and classes do not always tell, so the model is run on a few tokens: in one piece and in
two, with more tokens behind them, with states carried over a cut.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from cake_hf.layers.compat import LinearAttentionLayer
from cake_hf.layers.recurrent import states_of
from cake_hf.model.modules import has, modules_of
from cake_hf.model.side_run import differ, run_aside, some_tokens
from cake_hf.model.vision import family_of
from cake_hf.util.forks import Lock

STATE_TOLERANCE = 0.05
STATE_TOLERANCE_FLOAT32 = 0.01  # TF32 counts as well
LOGITS_TOLERANCE = 0.2
KV_TOLERANCE = 0.05
WINDOW_TOLERANCE = 0.03
WINDOW_TOLERANCE_FLOAT32 = 0.001
"""Relative differences: far above rounding, far below what a lost state, or a look ahead, does."""

SHORT = 4
"""Tokens of a prompt whose KV is looked at alone and with as many behind it."""
BEYOND_WINDOW = 24
"""Tokens of a trial beyond the window."""

WINDOWS_KNOWN = frozenset((
    "cohere2", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gpt_neo", "gpt_oss",
    "llama4", "llama4_text", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
))  # fmt: skip
"""Model types that `tests/test_context.py` tries beyond a window; others are tried at their first prompt that is longer."""

_verdicts: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()
_lock = Lock()


def forgets(model: torch.nn.Module) -> bool:
    """Whether a model with recurrent states loses them where a prompt is cut.

    Some models of transformers begin anew in every forward of more than one token. In pieces, they would give other results
    than in one, whatever the cache.
    """
    return _once(model, "forgets", _loses_state)


def differs_in_pieces(model: torch.nn.Module) -> bool:
    """Whether a model's logits for a short prompt in two pieces are others than in one, by more than rounding."""
    return _once(model, "differs in pieces", _differs, keeps=False)


def looks_ahead(model: torch.nn.Module) -> bool:
    """Whether the KV of a prompt's first tokens is other where more tokens follow them.

    So it is with attention in both directions, and where frequencies depend on how long the whole input is.
    """
    return _once(model, "looks ahead", _looks_ahead, keeps=False)


def differs_beyond_window(model: torch.nn.Module, tokens: int) -> bool:
    """Whether a prompt of so many tokens is longer than a window that the config names, and then differs in pieces."""
    window = _window(model.config)
    if not window or tokens <= window or getattr(model.config, "model_type", "") in WINDOWS_KNOWN:
        return False
    return _once(model, "differs beyond its window", lambda model: _differs_beyond(model, window))


def _once(model: torch.nn.Module, what: str, trial: Callable[[Any], bool], *, keeps: bool = True) -> bool:
    """What a trial says of a model.

    Args:
        model: any.
        what: the trial is about.
        trial: whether something is wrong.
        keeps: remember also that something is wrong. A short trial is repeated then: the model may have been patched when it
            was made.
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
    """The model turns out to have been changed."""
    with _lock:
        _verdicts.pop(model, None)


def _window(config: Any) -> int:
    """The smallest window that a config names; 0 if it names none."""
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
    # Where nothing was learnt yet, attention is too weak to show in what follows.
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
    """What a layer keeps of each token, `[1, heads, tokens, head_dim]`."""
    kept = [getattr(layer, name, None) for name in ("keys", "values")]
    return [tensor for tensor in kept if isinstance(tensor, torch.Tensor)]


def _beyond_context(model: Any) -> int:
    """A position beyond the context that a model was first made for, where its config names one, and within what it takes."""
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
    # Of the first such layer, whose input is the same in both, so that it shows no other difference.
    first = next(n for n, layer in enumerate(whole[1]) if isinstance(layer, LinearAttentionLayer))
    states = [states_of(layers[first]) for _, layers in (whole, cut)]
    recurrent = [name for name in states[0] if name.startswith("recurrent")]
    if not recurrent:  # a short convolution: its loss shows in what comes after it only
        return differ(whole[0], cut[0], LOGITS_TOLERANCE)
    is_float32 = model.get_input_embeddings().weight.dtype == torch.float32
    tolerance = STATE_TOLERANCE_FLOAT32 if is_float32 else STATE_TOLERANCE
    return any(differ(states[0][name], states[1][name], tolerance) for name in recurrent)
