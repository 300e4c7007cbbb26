"""The caller of a forward: information from the call stack that the forward's arguments do not contain.

`generate` passes a forward only the new part of a prompt, cut off by the length of the cache. Whether the cache holds the start
of this prompt can only be checked where the whole prompt is available.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, takewhile
from types import FrameType
from typing import Any, TypeVar

import torch

_NEAR = 16
"""Stack frames searched for the function that runs a prompt: it is three calls away, more if the forward is wrapped."""


T = TypeVar("T")


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt as it was passed to `generate`.

    Attributes:
        ids: `[rows, tokens]`, from the prompt's start on.
        mask: a mask of the same shape; None if nothing is masked.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None


def is_first_forward(model: torch.nn.Module) -> bool:
    """Returns whether the current forward is the first of a `generate` of that model. Takes a microsecond."""
    return _prefill_frame(model) is not None


def given_prompt(model: torch.nn.Module) -> GivenPrompt | None:
    """Returns the whole prompt in the first forward of a `generate`; None elsewhere, and if only the new part was passed."""
    frame = _prefill_frame(model)
    if frame is None:
        return None
    ids, named, config = (frame.f_locals.get(name) for name in ("input_ids", "model_kwargs", "generation_config"))
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not isinstance(named, dict):
        return None
    mask = named.get("attention_mask")
    # `generate` itself recognises a whole prompt by a mask of the same length. (It leaves out a mask of ones.)
    masked = mask.shape[-1] if isinstance(mask, torch.Tensor) else getattr(config, "_mask_length", None)
    return GivenPrompt(ids, mask) if masked == ids.shape[1] else None


def is_within_generate(model: torch.nn.Module) -> bool:
    """Returns whether the caller is inside a `generate` of that model, but not in its first forward."""
    if is_first_forward(model):
        return False
    return any(_is_of(frame, "generate", model) for frame in _stack(sys._getframe()))


def is_used_by(thread: int, model: torch.nn.Module, cache: Any) -> bool:
    """Returns whether a thread is in a forward or `generate` of that model with that cache, or in the cache's `prefill`."""
    for frame in _stack(sys._current_frames().get(thread)):
        name = frame.f_code.co_name
        if name == "prefill" and frame.f_locals.get("self") is cache:
            return True
        if name in ("_call_impl", "generate") and _is_of(frame, name, model) and _brings(frame, cache):
            return True
    return False


def cache_given_to_generate(model: torch.nn.Module, kind: type[T]) -> T | None:
    """Returns the cache of that class that was passed to the running `generate` of that model; None if there is none.

    A `generate` within another one may have its own cache, as an assistant model's has. If a custom generation function
    (`custom_generate`) calls it, it should use the outer one's cache. What a logits processor asks the model is no part of it.
    """
    stack = takewhile(lambda frame: not _processes_logits(frame), _stack(sys._getframe()))
    frames = [frame for frame in stack if _is_of(frame, "generate", model)]
    asked = [*frames[:1], *(frame for frame in frames[1:] if frame.f_locals.get("custom_generate") is not None)]
    return next((value for frame in asked for value in _given(frame) if isinstance(value, kind)), None)


def _prefill_frame(model: torch.nn.Module) -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_NEAR):  # a plain loop, since each decoding step runs it
        if frame is None or (frame.f_code.co_name == "_prefill" and frame.f_locals.get("self") is model):
            return frame
        frame = frame.f_back
    return None


def _is_of(frame: FrameType, name: str, model: torch.nn.Module) -> bool:
    return frame.f_code.co_name == name and frame.f_locals.get("self") is model


def _processes_logits(frame: FrameType) -> bool:
    return frame.f_code.co_name == "__call__" and {"input_ids", "scores"} <= frame.f_locals.keys()


def _brings(frame: FrameType, cache: Any) -> bool:
    return any(value is cache for value in _given(frame))


def _given(frame: FrameType) -> Iterator[Any]:
    """Returns all argument values of a call that takes arbitrary arguments."""
    named = frame.f_locals
    groups = (named.get("kwargs"), named.get("model_kwargs"))
    values = chain.from_iterable(group.values() for group in groups if isinstance(group, dict))
    return chain(values, named.get("args") or ())


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
