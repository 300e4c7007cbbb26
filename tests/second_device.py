"""A second device, "other:0", where torch has only the CPU: tensors that say they are there, and compute on the CPU.

Whatever mixes tensors of two devices raises, as it does with a GPU; only copying goes from one to the other.
`add_second_device` is for a process of its own: torch then believes to have an accelerator, and so do other libraries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "other"
_ANY_DEVICE = ("copy_", "_to_copy", "_copy_from", "index")  # a GPU takes indices from the host, too
_library: torch.library.Library | None = None


class OnOther(torch.Tensor):
    """A tensor on the second device. Its content is a tensor on the CPU; views of it are views of that."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> OnOther:
        if inner.device.type == "meta":  # a weight is taken away: accelerate makes it again by its class
            return torch.nn.Parameter(inner, requires_grad=requires_grad)  # type: ignore[return-value]
        if isinstance(inner, OnOther):
            inner = inner.inner
        made: OnOther = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnOther({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnOther:
        return OnOther(self.inner.clone())

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> OnOther:
        return OnOther(parts["inner"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, *args, **(kwargs or {}))


def add_second_device() -> torch.device:
    """Make the device known to torch, for the rest of the process."""
    global _library
    _setup_privateuseone_for_python_backend(NAME)
    _library = torch.library.Library("_", "IMPL")
    _library.fallback(_run, "PrivateUse1")  # what makes new tensors there, and so has none to be dispatched on
    torch.tensor = _tensor  # type: ignore[assignment]
    return torch.device(NAME, 0)


_plain_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor` copies to a device below the level on which these tensors are known."""
    made = _plain_tensor(data, **options)
    return made if device is None else made.to(device)


def _run(function: Any, *args: Any, **kwargs: Any) -> Any:
    leaves, tree = tree_flatten((args, kwargs))
    mine = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, OnOther)}
    foreign = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnOther)]
    name = function.overloadpacket.__name__
    if mine and name not in _ANY_DEVICE and any(leaf.ndim for leaf in foreign):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {NAME}:0 and cpu")
    to_other = any(isinstance(leaf, torch.device) and leaf.type == NAME for leaf in leaves)
    to_host = any(isinstance(leaf, torch.device) and leaf.type != NAME for leaf in leaves)
    args, kwargs = tree_unflatten([_on_cpu(leaf) for leaf in leaves], tree)
    result = function(*args, **kwargs)
    if to_host or (isinstance(leaves[0], torch.Tensor) and not isinstance(leaves[0], OnOther) and name == "copy_"):
        return result
    assert mine or to_other, name

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return mine[id(value)] if id(value) in mine else OnOther(value)

    return tree_map(wrapped, result)


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, OnOther):
        return leaf.inner
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf
