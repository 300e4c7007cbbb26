"""Finds all tensors that make up a model's weights, wherever a module keeps them.

Most are parameters and buffers. Quantised weights may not be: they may be tensors made of other tensors, or kept in a private
place of the module, which reveals them only when it is saved. accelerate's hooks (`cpu_offload`, `disk_offload`, a `device_map`
with "cpu" or "disk") leave a module's weights on the meta device, which has no content, and keep it elsewhere in memory or in
files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cake_hf.model.look import as_device, below, hooked_modules, modules_of, parameters_of


@dataclass(frozen=True)
class Offloaded:
    """A weight that a hook brings for each forward.

    Attributes:
        source: the mapping in which the hook looks it up: a dictionary, or accelerate's loader of memory and files.
        name: the name of the weight in the source.
        device: the device to which the hook brings it.
    """

    source: Mapping[str, torch.Tensor]
    name: str
    device: torch.device

    @property
    def in_memory(self) -> torch.Tensor | None:
        """The weight, if it is in memory: the tensor itself, not a copy; else None."""
        tensors = self.source if isinstance(self.source, dict) else getattr(self.source, "state_dict", {})
        found = tensors.get(self.name) if isinstance(tensors, Mapping) else None
        return found if isinstance(found, torch.Tensor) else None

    def read(self) -> torch.Tensor:
        """Returns the weight, read from memory or a file.

        Raises:
            OSError, KeyError: the weight no longer exists.
        """
        return self.source[self.name]

    def stamp(self) -> tuple[object, ...] | None:
        """Returns a cheap stamp that changes if the weight's file is changed or replaced; None if there is no such file."""
        file = self._file()
        if file is None:
            return None
        status = os.stat(file)
        return str(file), status.st_ino, status.st_size, status.st_mtime_ns

    def _file(self) -> Path | None:
        index, folder = getattr(self.source, "index", {}), getattr(self.source, "save_folder", None)
        if not isinstance(index, Mapping) or self.name not in index:
            return None
        if (shared := index[self.name].get("safetensors_file")) is not None:
            return Path(shared)
        return None if folder is None else Path(folder) / f"{self.name}.dat"


@dataclass(frozen=True)
class Weight:
    """A plain tensor of a model.

    Attributes:
        name: its path, and any further information that identifies it.
        tensor: strided, of a dtype that has bytes. For a weight that is not in memory, only its shape and dtype count.
        in_place: the model computes with this tensor, not with a copy of it, so its address and version are meaningful.
        elsewhere: the source from which it is read, if it is not in memory.
        device: the device on which the model computes with it, if hooks bring it there.
    """

    name: str
    tensor: torch.Tensor
    in_place: bool
    elsewhere: Offloaded | None = None
    device: torch.device | None = None

    def content(self) -> torch.Tensor:
        """Returns the tensor, read from its source if necessary.

        Raises:
            OSError, KeyError: the weight no longer exists.
        """
        return self.tensor if self.elsewhere is None else self.elsewhere.read().to(self.tensor.dtype)


def weights(model: torch.nn.Module) -> Iterator[list[Weight]]:
    """Yields parameters, persistent buffers, and other tensors that modules save.

    Other buffers are derived from the config, some again in each forward. A weight shared by several modules counts once for
    each: after offloading, it cannot be recognised as shared.

    The weights come in order, in groups: weights in memory together, and each weight that has to be copied by itself.
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
    """Returns the type of a tensor whose bytes cannot be determined; empty if there is none."""
    for weight in _one_by_one(model):
        tensor = weight.tensor
        opaque = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        nowhere = tensor.device.type == "meta" and weight.elsewhere is None
        if opaque or nowhere or tensor.is_nested or tensor.layout is not torch.strided:
            return type(tensor).__name__
    return ""


def _saved_besides(module: torch.nn.Module) -> dict[str, Any]:
    """Returns the values that a special module saves and that are neither its parameters nor its buffers."""
    plain = torch.nn.Module
    kind = type(module)
    if kind._save_to_state_dict is plain._save_to_state_dict and kind.get_extra_state is plain.get_extra_state:
        return {}
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", keep_vars=True)
    known = {**module._parameters, **module._buffers}
    return {name: value for name, value in saved.items() if name not in known}


def _found(name: str, value: torch.Tensor, offloaded: Offloaded | None) -> Iterator[Weight]:
    """Yields a parameter or buffer, from its hook's source if a hook brings it. How hooks treat special kinds is not known."""
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
    """Yields the parts of a tensor that is made of others, such as torchao's."""
    parts, context = made_of.__tensor_flatten__()
    kind = type(made_of).__qualname__  # different classes may compute differently with the same parts
    for part in parts:
        yield from _plain(f"{name}.{part} {kind} {context!r}", getattr(made_of, part), in_place=in_place)


def _quantized(name: str, value: torch.Tensor) -> Iterator[Weight]:
    """Yields the parts of a tensor of one of torch's quantised dtypes."""
    yield Weight(f"{name} {value.qscheme()}", value.int_repr(), in_place=False)
    if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        steps = torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64, device="cpu")
        yield Weight(f"{name} steps", steps, in_place=False)
    else:
        yield Weight(f"{name} scales", value.q_per_channel_scales(), in_place=False)
        yield Weight(f"{name} zero points", value.q_per_channel_zero_points(), in_place=False)


def offloaded_weights(model: torch.nn.Module) -> dict[str, Offloaded]:
    """Returns the parameters and buffers that hooks bring for each forward, by their names in the model."""
    found: dict[str, Offloaded] = {}
    for path, module, hook in hooked_modules(model):
        if not getattr(hook, "offload", False) or getattr(hook, "weights_map", None) is None:
            continue
        recurse = bool(getattr(hook, "place_submodules", False))
        device = as_device(hook.execution_device) or torch.device("cpu")
        names = [name for name, _ in module.named_parameters(recurse=recurse, remove_duplicate=False)]
        if getattr(hook, "offload_buffers", False):
            names += [name for name, _ in module.named_buffers(recurse=recurse, remove_duplicate=False)]
        for name in names:
            found[below(path, name)] = _without_prefixes(hook.weights_map, name, device)
    return found


def _without_prefixes(source: Any, name: str, device: torch.device) -> Offloaded:
    """Resolves accelerate's views: each module has a view of one mapping, which puts the module's path before the names."""
    while hasattr(source, "dataset") and hasattr(source, "prefix"):
        source, name = source.dataset, f"{source.prefix}{name}"
    return Offloaded(source, name, device)
