"""The location of a model's weights, and its computing devices, if hooks bring the weights for each forward.

accelerate's hooks (`cpu_offload`, `disk_offload`, a `device_map` with "cpu" or "disk") leave a module's weights on the meta
device, which has no content, and keep their content elsewhere in memory or in files. This module does not import accelerate; it
reads the attributes of its hooks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cake_hf.model.look import below, modules_of, once_per_look


@dataclass(frozen=True)
class Offloaded:
    """A weight that a hook brings for each forward.

    Attributes:
        source: the mapping in which the hook looks it up: a dictionary, or accelerate's loader of memory and files.
        name: of the weight in the source.
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


def offloaded_weights(model: torch.nn.Module) -> dict[str, Offloaded]:
    """Returns the parameters and buffers that hooks bring for each forward, by their names in the model."""
    found: dict[str, Offloaded] = {}
    for path, module in modules_of(model):
        for hook in _hooks(module):
            if not getattr(hook, "offload", False) or getattr(hook, "weights_map", None) is None:
                continue
            recurse = bool(getattr(hook, "place_submodules", False))
            device = _as_device(hook.execution_device) or torch.device("cpu")
            names = [name for name, _ in module.named_parameters(recurse=recurse, remove_duplicate=False)]
            if getattr(hook, "offload_buffers", False):
                names += [name for name, _ in module.named_buffers(recurse=recurse, remove_duplicate=False)]
            for name in names:
                found[below(path, name)] = _without_prefixes(hook.weights_map, name, device)
    return found


@once_per_look
def computing_devices(model: torch.nn.Module) -> list[tuple[str, torch.device]]:
    """Returns the path and the computing device of each module with parameters of its own."""
    found: list[tuple[str, torch.device]] = []
    _visit(model, "", None, found, math.inf)
    return found


@once_per_look
def home_device(model: torch.nn.Module) -> torch.device:
    """Returns the device that computes with a model's first parameter, which is also the best one for token ids."""
    found: list[tuple[str, torch.device]] = []
    _visit(model, "", None, found, 1)
    return found[0][1]


def devices_of(model: torch.nn.Module) -> list[torch.device]:
    """Returns all devices on which a model computes, each once."""
    return list(dict.fromkeys(device for _, device in computing_devices(model)))


def where_computed(model: torch.nn.Module) -> str:
    """Describes where a model computes, for users and for cost estimates: "cuda:0", "cpu, weights offloaded", ..."""
    moved = any(getattr(hook, "offload", False) for _, module in modules_of(model) for hook in _hooks(module))
    return ", ".join([*map(str, devices_of(model)), *["weights offloaded"] * moved])


def _visit(
    module: torch.nn.Module, path: str, outer: torch.device | None, found: list[tuple[str, torch.device]], most: float
) -> None:
    own, whole = _execution_device(module)
    for parameter in module._parameters.values():
        if parameter is not None:
            found.append((path, own or outer or parameter.device))
            break
    for name, child in module._modules.items():
        if child is not None and len(found) < most:
            _visit(child, f"{path}.{name}" if path else name, own if whole else outer, found, most)


def _execution_device(module: torch.nn.Module) -> tuple[torch.device | None, bool]:
    """Returns the device on which hooks make a module compute, and whether that applies to all its submodules."""
    for hook in reversed(_hooks(module)):
        device = _as_device(getattr(hook, "execution_device", None))
        if device is not None:
            return device, bool(getattr(hook, "place_submodules", True))
    return None, False


def _hooks(module: torch.nn.Module) -> Sequence[Any]:
    hook = vars(module).get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))


def _as_device(given: Any) -> torch.device | None:
    """Converts a hook's device, which may be a `torch.device`, a text or a number."""
    return None if given is None else torch.device(given)


def _without_prefixes(source: Any, name: str, device: torch.device) -> Offloaded:
    """Resolves accelerate's views: each module has a view of one mapping, which puts the module's path before the names."""
    while hasattr(source, "dataset") and hasattr(source, "prefix"):
        source, name = source.dataset, f"{source.prefix}{name}"
    return Offloaded(source, name, device)
