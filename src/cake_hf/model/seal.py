"""A seal on a model, by which a change is found that lasts no longer than a turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from operator import call, is_
from typing import Any

import torch
from torch.nn.modules import module as torchs_modules

from cake_hf.layers.compat import chosen_functions
from cake_hf.model.code import TORCHS_OWN, code_of
from cake_hf.model.foreign_code import ReadsOnly, mode_refusal
from cake_hf.model.look import devices_of, hooked_modules, modules_of
from cake_hf.model.numerics import current_modes

_REGISTERED = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers")
_PLAIN = (bool, int, float, str, torch.dtype)


class ModelSeal:
    """Finds that something changes a model, or how torch computes, before that is undone.

    It compares by identity what modules, their classes and configs hold. For 400 modules that takes 0.4 milliseconds, little
    enough to be done for each decoded token. Hidden edits of weights (`.data`, numpy) are not found.

    Args:
        model: the model, as it should be.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        attributes = [vars(module) for _, module in modules_of(model)]
        brings_weights = any(getattr(hook, "offload", False) for _, _, hook in hooked_modules(model))
        names = _REGISTERED[:3] if brings_weights else _REGISTERED  # such hooks replace the weights in each forward
        registered = [each[name] for each in attributes for name in names]
        registered += [torchs_modules._global_forward_hooks, torchs_modules._global_forward_pre_hooks]
        configs = {id(config): vars(config) for each in attributes if hasattr(config := each.get("config"), "__dict__")}
        inner = [
            value for each in attributes for name, value in each.items()
            if type(value) in (dict, list) and name not in TORCHS_OWN
        ]  # fmt: skip
        self._registered, self._noted = (
            _values(registered),
            _values([*attributes, *configs.values(), *code_of(model), *inner]),
        )
        self._tensors = [tensor for tensor in _held(self._registered) if isinstance(tensor, torch.Tensor)]
        self._noted.append(lambda: chosen_functions(model.config).values())
        self._device_types = {device.type for device in devices_of(model)}
        self._before = self._look()

    def is_broken(self) -> bool:
        """Returns whether the model differs now from when the seal was made."""
        (modes, versions, registered, noted), now = self._before, self._look()
        if modes != now[0] or versions != now[1] or not _all(is_, registered, now[2]):
            return True
        return not _all(is_, noted, now[3]) and not _all(_is_same, noted, now[3])

    def _look(self) -> tuple[object, object, list[Any], list[Any]]:
        versions = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in self._tensors]
        modes = [mode_refusal(), *current_modes(self._device_types)]
        registered = [value for value in _held(self._registered) if type(value) is not ReadsOnly]
        return modes, versions, registered, _held(self._noted)


def _values(containers: Iterable[Any]) -> list[Callable[[], Iterable[Any]]]:
    return [container.__iter__ if isinstance(container, list) else container.values for container in containers]


def _held(sources: Iterable[Callable[[], Iterable[Any]]]) -> list[Any]:
    return list(chain.from_iterable(map(call, sources)))


def _all(is_alike: Callable[[Any, Any], bool], before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(map(is_alike, before, now))


def _is_same(one: Any, other: Any) -> bool:
    """Returns whether a value is still the same; also if it is a note that a forward makes, such as a tensor of positions."""
    if one is other or type(one) is not type(other):
        return one is other
    return one == other if isinstance(one, _PLAIN) else type(one) is torch.Tensor
