"""Which processor this is, as far as rounding goes.

Matrix libraries choose their kernels by a processor's maker, model and vector instructions, so two machines that torch calls
"AVX512" may round differently: with tiles (AMX) or without, by one maker's code path or the other's.
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
"""How x86's flags begin that count; the others tell what kernel and hypervisor make of the processor, and change with these."""


@cache
def processor() -> Mapping[str, Any]:
    """Maker, model and vector instructions of this machine's processor, JSON-ready; found out once per process.

    Says too much rather than too little. Where only a part of the cores is on while it is asked, or a newer kernel tells of an
    instruction more, the same machine looks like another one: a miss, and no harm.
    """
    try:
        told = CPUINFO.read_text(errors="replace")
    except OSError:
        told = ""
    return described(told) or {"cpu": _named_by_the_system()}


def described(cpuinfo: str) -> dict[str, Any]:
    """What counts of a Linux `/proc/cpuinfo`, each thing once, for cores may differ; empty where it says nothing."""
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
    """Where there is no such file: Windows tells family and model at once, macOS the architecture alone."""
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass  # then the architecture has to do
    return platform.processor() or platform.machine()
