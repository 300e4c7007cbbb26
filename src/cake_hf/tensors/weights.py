"""All tensors that a model's weights are made of, wherever a module keeps them.

Most are parameters and buffers. Quantised weights are not always: they may be tensors made of other tensors, or in a place
of the module's own, from where they come out only when it is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Weight:
    """One plain tensor of a model.

    Attributes:
        name: where it is, and what else is to be known about it.
        tensor: strided, of a dtype that has bytes.
        in_place: it is what the model computes with, not a copy of that; so its address and version say something.
    """

    name: str
    tensor: torch.Tensor
    in_place: bool


def weights(model: torch.nn.Module) -> Iterator[Weight]:
    """Parameters, persistent buffers, and what modules save besides. Other buffers are derived from the config, some anew in
    each forward.
    """
    for name, parameter in model.named_parameters():
        yield from _plain(name, parameter, in_place=True)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield from _plain(f"{path}.{name}", buffer, in_place=True)
        for name, value in _saved_besides(module).items():
            yield from _plain(f"{path}.{name}", value, in_place=False)


def unknown_weights(model: torch.nn.Module) -> str:
    """The type of a tensor whose bytes cannot be told; empty if there is none."""
    for weight in weights(model):
        tensor = weight.tensor
        opaque = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        if opaque or tensor.is_nested or tensor.layout is not torch.strided:
            return type(tensor).__name__
    return ""


def _saved_besides(module: torch.nn.Module) -> dict[str, Any]:
    """What a module of a special kind saves that is neither its parameter nor its buffer."""
    plain = torch.nn.Module
    kind = type(module)
    if kind._save_to_state_dict is plain._save_to_state_dict and kind.get_extra_state is plain.get_extra_state:
        return {}
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", keep_vars=True)
    known = {**module._parameters, **module._buffers}
    return {name: value for name, value in saved.items() if name not in known}


def _plain(name: str, value: Any, *, in_place: bool) -> Iterator[Weight]:
    if isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from _plain(f"{name}.{number}", item, in_place=in_place)
    elif not torch.is_tensor(value):
        yield Weight(f"{name}={value!r}", torch.empty(0), in_place)
    elif _has_parts(value):
        yield from _parts(name, value, in_place=in_place)
    elif value.is_quantized:
        yield from _quantized(name, value)
    else:
        yield Weight(name, value, in_place)


def _has_parts(tensor: Any) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


def _parts(name: str, made_of: Any, *, in_place: bool) -> Iterator[Weight]:
    """A tensor that is made of others, as those of torchao."""
    parts, context = made_of.__tensor_flatten__()
    kind = type(made_of).__qualname__  # the same parts may be computed with in several ways
    for part in parts:
        yield from _plain(f"{name}.{part} {kind} {context!r}", getattr(made_of, part), in_place=in_place)


def _quantized(name: str, value: torch.Tensor) -> Iterator[Weight]:
    """A tensor of one of torch's quantised dtypes."""
    yield Weight(f"{name} {value.qscheme()}", value.int_repr(), in_place=False)
    if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        steps = torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64)
        yield Weight(f"{name} steps", steps, in_place=False)
    else:
        yield Weight(f"{name} scales", value.q_per_channel_scales(), in_place=False)
        yield Weight(f"{name} zero points", value.q_per_channel_zero_points(), in_place=False)
