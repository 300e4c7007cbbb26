"""The identity of this machine's processor, as far as rounding depends on it.

Matrix libraries choose their kernels by a processor's vendor, model and vector instructions. So two machines that torch calls
"AVX512" may round differently: with or without tiles (AMX), by one vendor's code path or another's.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
_MODEL = re.compile(
    r"^(vendor_id|cpu family|model|CPU implementer|CPU architecture|CPU variant|CPU part|cpu|isa|uarch)[ \t]*:[ \t]*(.*)$",
    re.MULTILINE,
)
_FEATURES = re.compile(r"^features[ \t]*:(.*)$", re.MULTILINE | re.IGNORECASE)
_FLAGS = re.compile(r"^flags[ \t]*:(.*)$", re.MULTILINE)
_VECTOR_FLAG = re.compile(r"mmx|sse|ssse|avx|amx|fma|f16c|misalignsse")
"""Prefixes of the relevant x86 flags; the others depend on kernel and hypervisor, and change with them."""


@cache
def processor() -> Mapping[str, Any]:
    """Returns vendor, model and vector instructions of this machine's processor, JSON-ready; read once per process.

    The result is too specific rather than too general. If only some cores are online when it is read, or a newer kernel reports
    one more instruction, the same machine looks like another one: a miss, which is harmless.
    """
    try:
        told = CPUINFO.read_text(errors="replace")
    except OSError:
        told = ""
    return described(told) or {"cpu": _named_by_the_system()}


def described(cpuinfo: str) -> dict[str, Any]:
    """Returns the relevant parts of a Linux `/proc/cpuinfo`, each value once, since cores may differ; empty if it has none."""
    models: dict[str, set[str]] = {}
    for name, value in _MODEL.findall(cpuinfo):
        models.setdefault(name if name.lower().startswith("cpu") else f"cpu {name}", set()).add(value.strip())
    features = {feature for line in set(_FEATURES.findall(cpuinfo)) for feature in line.split()}
    flags = {flag for line in set(_FLAGS.findall(cpuinfo)) for flag in line.split() if _VECTOR_FLAG.match(flag)}
    if not models:
        return {}
    told = {name: ", ".join(sorted(values)) for name, values in models.items()}
    return {**told, "instructions": dict.fromkeys(sorted(features | flags), True)}


def _named_by_the_system() -> str:
    """Returns the system's name for the processor, for systems without `/proc/cpuinfo`.

    `platform.processor()` gives family and model on Windows, but only the architecture on macOS.
    """
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass  # the architecture has to do
    return platform.processor() or platform.machine()
