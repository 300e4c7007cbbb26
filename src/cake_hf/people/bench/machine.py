"""What ran the bench: enough to compare two results, nothing that says whose machine it is."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

import cake_hf
from cake_hf.people.bench.models import transformers_version


def describe() -> dict[str, object]:
    """Processor, memory, versions. The load average tells whether the machine had other things to do (above 0: it had)."""
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
    }


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
