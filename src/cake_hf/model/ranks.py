"""Support for models that several processes compute together, each with its part of the weights.

Under tensor parallelism all ranks run the same prompt, each with its own heads, and so each keeps its own part of the KV. Their
forwards wait for each other, so all ranks must run the same forwards in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cake_hf.report import Refusal


@dataclass(frozen=True)
class Ranks:
    """The processes that compute a tensor-parallel model together, from the point of view of one process.

    Attributes:
        group: the group of the processes.
        rank: the rank of this process.
        size: the number of processes.
        device: the device from which the group can send numbers.
    """

    group: Any
    rank: int
    size: int
    device: torch.device

    def all_reduce_min(self, numbers: Sequence[int]) -> list[int]:
        """Returns the minimum of each number over all ranks. All ranks must call it together, with equally many numbers.

        It blocks until all ranks have called it: as long as the slowest one waits for loads, each with its deadline, and at
        most for the process group's timeout, which applies to forwards as well.

        Raises:
            RuntimeError: a rank is gone, or did not call within the process group's timeout.
        """
        brought = torch.tensor(list(numbers), dtype=torch.int64, device=self.device)
        dist.all_reduce(brought, op=dist.ReduceOp.MIN, group=self.group)
        found: list[int] = brought.tolist()
        return found

    def span(self, number: int) -> tuple[int, int]:
        """Returns the minimum and the maximum of a number over all ranks. Blocks like `all_reduce_min`."""
        least, negative = self.all_reduce_min([number, -number])
        return least, -negative

    def all_alike(self, numbers: Sequence[int]) -> bool:
        """Returns whether all ranks pass the same numbers. Blocks like `all_reduce_min`."""
        found = self.all_reduce_min([*numbers, *(-number for number in numbers)])
        return found[: len(numbers)] == [-number for number in found[len(numbers) :]]


def ranks_of(model: torch.nn.Module) -> Ranks | None:
    """Returns the ranks that compute a tensor-parallel model; None for a model that this process computes alone.

    Args:
        model: a model for which `parallel_refusal` is None.
    """
    meshes = _meshes(model)
    if not meshes or meshes[0].size() == 1:
        return None
    group = meshes[0].get_group()
    on_host = "gloo" in dist.get_backend(group)
    device = (
        torch.device("cpu")
        if on_host
        else torch.device(meshes[0].device_type, torch.accelerator.current_device_index())
    )
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group), device)


def parallel_refusal(model: torch.nn.Module) -> Refusal | None:
    """Returns why the ranks of a distributed model cannot agree on a restore; None if they can."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if _gathers_weights(model):
        return Refusal(
            "gathered-weights",
            "the model's weights are gathered from other processes in each forward, which cannot be restored yet",
        )
    meshes, whole = _meshes(model), getattr(model, "_device_mesh", None)
    if len(meshes) > 1 or any(mesh.ndim > 1 for mesh in meshes):
        return Refusal("mixed-parallelism", "the model is parallel in more than one way, which cannot be restored yet")
    if whole is not None and whole.size() != (meshes[0].size() if meshes else 1):
        return Refusal(
            "other-parallelism",
            "the model is parallel in other ways than by its tensors, which cannot be restored yet",
        )
    return None


def parallel_metadata(model: torch.nn.Module, *, exact: bool) -> dict[str, Any]:
    """Returns rank and group size and, if `exact`, the backend that sums the ranks' parts; empty for a single process."""
    ranks = ranks_of(model)
    if ranks is None:
        return {}
    metadata: dict[str, Any] = {"rank": ranks.rank, "size": ranks.size}
    return {**metadata, "backend": dist.get_backend(ranks.group)} if exact else metadata


def _meshes(model: torch.nn.Module) -> list[Any]:
    """Returns the process meshes over which the model's weights are distributed, each once."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.tensor import DTensor

    return list(dict.fromkeys(weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)))


def _gathers_weights(model: torch.nn.Module) -> bool:
    """Returns whether FSDP (old or new) or DeepSpeed's ZeRO-3 is in use: with these, each rank may run another prompt."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    sharded = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    return sharded or any(hasattr(weight, "ds_id") for weight in model.parameters())
