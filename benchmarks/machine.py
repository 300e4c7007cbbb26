"""Describes the machine of a run: enough to compare two results, nothing that says whose machine it is."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

import cake_hf
from benchmarks.models import transformers_version
from benchmarks.stolen import StolenTime
from benchmarks.timing import TOLERATED


class Machine:
    """The machine that runs a bench starting now.

    Args:
        device: that computes.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._found = describe(device)
        self._stolen = StolenTime()

    def as_dict(self) -> dict[str, object]:
        """Returns JSON-ready values: those of `describe`, and the share of the processors' time that was stolen so far."""
        known = {**self._found, "stolen_share": round(self._stolen.share(), 3)}
        if self._device.type == "cuda":
            # More than a few: timed runs have waited for memory that was being freed.
            known["gpu_allocation_retries"] = torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0)
        return known


def disturbance(machine: Mapping[str, object]) -> str:
    """Returns a sentence about disturbances; empty if there is nothing to say.

    Args:
        machine: from `Machine.as_dict`.
    """
    share = machine.get("stolen_share")
    if not isinstance(share, float) or share <= TOLERATED:
        return ""
    return f"{share:.0%} of the processors' time went to other virtual machines: measure again in a quieter hour."


def describe(device: str = "cpu") -> dict[str, object]:
    """Returns processor, memory, versions, and the GPU if the device is one.

    The load average tells whether the machine had other things to do (above 0: it had).
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "load_average_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": transformers_version(),
        "cake_hf": cake_hf.__version__,
        **(_gpu(torch.device(device)) if torch.device(device).type == "cuda" else {}),
    }


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
        "gpu_allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }


def _driver_version() -> str | None:
    """Returns the driver's version as its own tool tells it; torch knows only the CUDA version that it was built for."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(told.stdout.split()), None) if told.returncode == 0 else None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
