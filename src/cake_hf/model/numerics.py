"""The numerics of this machine: everything that can make the same weights and tokens give different bits.

Two processes with equal numerics compute equal KV with equal models (see `model.fingerprint`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch

from cake_hf.model.look import computing_devices, devices_of
from cake_hf.util.processor import processor

_CPU_SETTINGS = (
    "mkldnn.enabled",
    "mkldnn.fp32_precision",
    "mkldnn.conv.fp32_precision",
)
_CUDA_SETTINGS = (
    "cuda.matmul.fp32_precision",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction_split_k",
    "cuda.matmul.allow_fp16_reduced_precision_reduction_split_k",
    "cuda.matmul.allow_fp16_accumulation",
    "cuda.preferred_blas_library",
    "cuda.fp16_bf16_reduction_math_sdp_allowed",
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cudnn.depthwise_kernel",
    "cudnn.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
)
"""Settings of `torch.backends` that change how the same weights round; none of them exists in every version."""
_OLD_CUDA_SETTINGS = ("cuda.matmul.allow_tf32", "cudnn.allow_tf32")
"""Settings of versions without `fp32_precision`; some versions that have it warn when these are read."""

_CPU_VARIABLES = (
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OMP_DYNAMIC",
    "OPENBLAS_CORETYPE",
)
_CUDA_VARIABLES = (
    "CUBLASLT_WORKSPACE_SIZE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_CUDNN_SDPA_AVOID_RECOMPILE",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED",
    "TORCH_CUDNN_SDPA_PREFERRED",
)
"""Variables by which libraries below torch choose their kernels, and which torch does not report."""


def numerics_metadata(model: torch.nn.Module) -> dict[str, Any]:
    """Returns all that makes the same weights and tokens round differently: device, kernels, libraries, threads, modes."""
    metadata: dict[str, Any] = {
        "attention": _attention_metadata(model.config),
        "experts": str(getattr(model.config, "_experts_implementation", None)),
        "torch": torch.__version__,
        "precision": _precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    by_device = {device: _device_metadata(device) for device in devices_of(model)}
    metadata.update(next(iter(by_device.values())))
    if any(other != next(iter(by_device.values())) for other in by_device.values()):
        # The kind of device of each part. Devices of one kind round alike, so it does not matter which of them computes a part.
        metadata["parts"] = [(path, by_device[device]) for path, device in computing_devices(model)]
    return metadata


def autocast_metadata(device_type: str) -> str:
    """Returns the dtype in which autocast currently computes, or "off"."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return "off"
    return str(torch.get_autocast_dtype(device_type))


def autocast_modes(device_types: Iterable[str]) -> tuple[str, ...]:
    """Returns `autocast_metadata` of each kind of device."""
    return tuple(map(autocast_metadata, device_types))


def current_modes(device_types: Iterable[str]) -> list[object]:
    """Returns what of `numerics_metadata` a program may switch between two forwards, except for the model's own config."""
    return [
        autocast_modes(device_types),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        _precision(),
        _sdpa_metadata(),
    ]


def _attention_metadata(config: Any) -> Any:
    """Returns the attention kernels of the model, and of its parts if it has several (text, vision)."""
    own = str(getattr(config, "_attn_implementation", None))
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}}
    named = {name: str(getattr(part, "_attn_implementation", None)) for name, part in parts.items() if part is not None}
    return {"": own, **named} if named else own


def _device_metadata(device: torch.device) -> dict[str, Any]:
    """Returns everything that makes a device round differently from others."""
    metadata: dict[str, Any] = {"device": device.type, "autocast": autocast_metadata(device.type)}
    if device.type == "cuda":
        metadata["hardware"] = torch.cuda.get_device_name(device)
        settings = _CUDA_SETTINGS if _setting("fp32_precision") else _CUDA_SETTINGS + _OLD_CUDA_SETTINGS
        metadata["cuda"] = [torch.version.cuda, _said(torch.backends.cudnn.version), *map(_setting, settings)]
        metadata["sdpa"] = [*_sdpa_metadata(), *_sdpa_choice()]
        metadata["variables"] = _variables(_CUDA_VARIABLES)
    elif device.type == "cpu":
        metadata["hardware"] = torch.backends.cpu.get_cpu_capability()
        metadata["processor"] = processor()
        metadata["threads"] = torch.get_num_threads()
        metadata["quantized"] = torch.backends.quantized.engine
        metadata["mkldnn"] = list(map(_setting, _CPU_SETTINGS))
        metadata["sdpa"] = _sdpa_metadata()
        metadata["variables"] = _variables(_CPU_VARIABLES)
    return metadata


def _precision() -> str:
    """Returns the precision settings for all kinds of devices. A torch with the new settings warns if the old one is read."""
    told = [_setting(path) for path in ("fp32_precision", "mkldnn.matmul.fp32_precision")]
    return ", ".join(told) if any(told) else _said(torch.get_float32_matmul_precision)


def _setting(path: str) -> str:
    """Returns the current value of a `torch.backends` setting; empty if this torch lacks it, or does not report it."""
    try:
        found = attrgetter(path)(torch.backends)
    except (AttributeError, RuntimeError):
        return ""
    return _said(found if callable(found) else lambda: found)


def _said(ask: Callable[[], object]) -> str:
    """Returns the answer as text; empty if torch raises: after a precision is set in the new way, reading the old one fails."""
    try:
        return str(ask())
    except RuntimeError:
        return ""


def _sdpa_metadata() -> list[bool]:
    backends = torch.backends.cuda
    return [
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
    ]


def _sdpa_choice() -> list[str]:
    """Returns the order in which attention kernels are tried on a GPU, and the flash attention that is used, if torch tells."""
    order = getattr(torch._C, "_get_sdp_priority_order", None)
    flash = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return [_said(ask) for ask in (order, flash) if ask is not None]


@cache
def _variables(names: Sequence[str]) -> dict[str, str]:
    """Returns those variables that are set. They are read once, as by the libraries, at about the same time: on first use."""
    return {name: os.environ[name] for name in names if name in os.environ}
