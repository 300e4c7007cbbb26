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

from cake_hf.model.modules import modules_of, parameters_of
from cake_hf.model.offload import Offloaded, offloaded_weights


@dataclass(frozen=True)
class Weight:
    """One plain tensor of a model.

    Attributes:
        name: where it is, and what else is to be known about it.
        tensor: strided, of a dtype that has bytes. Of a weight that lies elsewhere only its shape and dtype count.
        in_place: it is what the model computes with, not a copy of that; so its address and version say something.
        elsewhere: where it is read from, if it is not in memory.
        device: where the model computes with it, if hooks bring it there.
    """

    name: str
    tensor: torch.Tensor
    in_place: bool
    elsewhere: Offloaded | None = None
    device: torch.device | None = None

    def content(self) -> torch.Tensor:
        """The tensor, read from where it lies if need be.

        Raises:
            OSError, KeyError: it is not there any more.
        """
        return self.tensor if self.elsewhere is None else self.elsewhere.read().to(self.tensor.dtype)


def weights(model: torch.nn.Module) -> Iterator[list[Weight]]:
    """Parameters, persistent buffers, and what modules save besides. Other buffers are derived from the config, some anew in
    each forward. A weight that modules share counts for each of them: once it is offloaded, nothing shows that it is shared.

    They come in order, some at a time: those that lie in memory together, and each that is copied for this by itself.
    """
    together: list[Weight] = []
    for weight in _one_by_one(model):
        if weight.in_place:
            together.append(weight)
        else:
            yield together
            together = []
            yield [weight]
    yield together


def _one_by_one(model: torch.nn.Module) -> Iterator[Weight]:
    offloaded = offloaded_weights(model)
    for name, parameter in parameters_of(model):
        yield from _found(name, parameter, offloaded.get(name))
    for path, module in modules_of(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield from _found(f"{path}.{name}", buffer, offloaded.get(f"{path}.{name}"))
        for name, value in _saved_besides(module).items():
            yield from _plain(f"{path}.{name}", value, in_place=False)


def unknown_weights(model: torch.nn.Module) -> str:
    """The type of a tensor whose bytes cannot be told; empty if there is none."""
    for weight in _one_by_one(model):
        tensor = weight.tensor
        opaque = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        nowhere = tensor.device.type == "meta" and weight.elsewhere is None
        if opaque or nowhere or tensor.is_nested or tensor.layout is not torch.strided:
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


def _found(name: str, value: torch.Tensor, offloaded: Offloaded | None) -> Iterator[Weight]:
    """A parameter or buffer, from where a hook brings it, if one does. What hooks make of special kinds is not known."""
    if offloaded is not None and type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        tensor = offloaded.in_memory
        if tensor is None:
            yield Weight(name, value, in_place=False, elsewhere=offloaded, device=offloaded.device)
        else:
            converted = tensor.to(value.dtype)  # as the hook does
            yield Weight(name, converted, in_place=converted is tensor, device=offloaded.device)
    else:
        yield from _plain(name, value, in_place=True)


def _plain(name: str, value: Any, *, in_place: bool) -> Iterator[Weight]:
    if isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from _plain(f"{name}.{number}", item, in_place=in_place)
    elif not torch.is_tensor(value):
        yield Weight(f"{name}={value!r}", torch.empty(0, device="cpu"), in_place)
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
        steps = torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64, device="cpu")
        yield Weight(f"{name} steps", steps, in_place=False)
    else:
        yield Weight(f"{name} scales", value.q_per_channel_scales(), in_place=False)
        yield Weight(f"{name} zero points", value.q_per_channel_zero_points(), in_place=False)
