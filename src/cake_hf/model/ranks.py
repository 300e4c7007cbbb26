"""Models that several processes compute together, each with its part of the weights.

Tensor parallel: all ranks run the same prompt, each with its own heads, and so each keeps its own part of the KV. Their
forwards wait for each other. So they must be the same forwards in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """The processes that compute a tensor-parallel model together, seen from one of them.

    Attributes:
        group: of the processes.
        rank: of this one.
        size: how many there are.
        device: where numbers have to be to be sent.
    """

    group: Any
    rank: int
    size: int
    device: torch.device

    def all_reduce_min(self, numbers: Sequence[int]) -> list[int]:
        """Of each number the least that any rank brings. All ranks call it together, each with as many numbers.

        Blocks until all have: as long as the slowest has loads to wait for, each with its deadline, and at most as long as
        the process group allows for a forward, too.

        Raises:
            RuntimeError: a rank is gone, or did not come within the process group's timeout.
        """
        brought = torch.tensor(list(numbers), dtype=torch.int64, device=self.device)
        dist.all_reduce(brought, op=dist.ReduceOp.MIN, group=self.group)
        found: list[int] = brought.tolist()
        return found

    def span(self, number: int) -> tuple[int, int]:
        """The least and the greatest number that any rank brings. As `all_reduce_min`."""
        least, negative = self.all_reduce_min([number, -number])
        return least, -negative

    def all_alike(self, numbers: Sequence[int]) -> bool:
        """Whether all ranks bring the same numbers. As `all_reduce_min`."""
        found = self.all_reduce_min([*numbers, *(-number for number in numbers)])
        return found[: len(numbers)] == [-number for number in found[len(numbers) :]]


def ranks_of(model: torch.nn.Module) -> Ranks | None:
    """With whom this process computes a tensor-parallel model; None for a model that it computes alone.

    Args:
        model: one that `parallel_reason` has no objection to.
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


def parallel_reason(model: torch.nn.Module) -> str:
    """Why a model that several processes compute is none whose ranks can agree on a restore; empty if there is nothing."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    if _gathers_weights(model):
        return "the model's weights are gathered from other processes in each forward, which cannot be restored yet"
    meshes, whole = _meshes(model), getattr(model, "_device_mesh", None)
    if len(meshes) > 1 or any(mesh.ndim > 1 for mesh in meshes):
        return "the model is parallel in more than one way, which cannot be restored yet"
    if whole is not None and whole.size() != (meshes[0].size() if meshes else 1):
        return "the model is parallel in other ways than by its tensors, which cannot be restored yet"
    return ""


def parallel_facts(model: torch.nn.Module, *, exact: bool) -> dict[str, Any]:
    """What a rank's KV is a part of and, if it is to be exact, what sums up the ranks' parts. Empty for a model alone."""
    ranks = ranks_of(model)
    if ranks is None:
        return {}
    facts: dict[str, Any] = {"rank": ranks.rank, "size": ranks.size}
    return {**facts, "backend": dist.get_backend(ranks.group)} if exact else facts


def _meshes(model: torch.nn.Module) -> list[Any]:
    """The meshes of processes that the model's weights are spread over, each once."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.tensor import DTensor

    return list(dict.fromkeys(weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)))


def _gathers_weights(model: torch.nn.Module) -> bool:
    """FSDP, old and new, and DeepSpeed's ZeRO-3: there each rank may run another prompt."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    sharded = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    return sharded or any(hasattr(weight, "ds_id") for weight in model.parameters())
