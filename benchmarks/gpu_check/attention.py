"""Do the first layer's attention outputs have the same bits in a chunked `DynamicCache` and in ours? If not: with which kernel?

Ours keeps KV by token, a `DynamicCache` by head, so attention sees other strides. A kernel that picks another way of computing
for that rounds differently. For each attention, and for each of torch's own kernels alone, a prompt of a few chunks is run
three times: twice with a `DynamicCache` (a kernel whose bits change from run to run can be compared with nothing) and once
with ours, computing all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.desk import Desk
from benchmarks.gpu_check.families import runs_here
from benchmarks.gpu_check.outcome import Plain
from benchmarks.models import build_model, build_prompt
from benchmarks.workbench import Workbench
from cake_hf import reads_only
from cake_hf.stores.memory import MemoryStore
from cake_hf.util.redaction import shown

CHUNKS = 4
LAYERS = 2
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Those that `scaled_dot_product_attention` chooses from."""

Outputs = list[torch.Tensor]


def run(desk: Desk) -> None:
    """Compare under each setting, and say under which the bits are equal."""
    sizes = desk.sizes
    settings = sizes.settings(tokens=CHUNKS * sizes.chunk_size)
    settings = replace(settings, shape=replace(settings.shape, layers=LAYERS))
    bench = Workbench(settings, build_model(settings), build_prompt(settings), desk.folder)
    found: Plain = {"settings": {}}
    for attention in sizes.attentions:
        if not runs_here(attention, sizes.dtype, sizes.device):
            continue
        bench.model.set_attn_implementation(attention)
        kernels = {"as it is": None, **KERNELS} if attention == "sdpa" else {"as it is": None}
        for name, kernel in kernels.items():
            found["settings"][f"{attention}, {name}"] = _compared(bench, kernel)
            desk.keep(found)
    usual = found["settings"].get("sdpa, as it is", {})
    found["equal"] = bool(usual.get("equal"))
    found["equal_with"] = [name for name, one in found["settings"].items() if one.get("equal")]
    desk.keep(found)


def _compared(bench: Workbench, kernel: SDPBackend | None) -> Plain:
    chosen: AbstractContextManager[object] = nullcontext() if kernel is None else sdpa_kernel([kernel])
    try:
        with chosen:
            first, again = (_outputs(bench, None) for _ in range(2))
            with bench.cache(MemoryStore(), strategy="compute") as cache:
                ours = _outputs(bench, cache)
                reason = cache.report.reason
    except RuntimeError as error:  # a kernel that is not there, or not for this dtype
        return {"equal": None, "reason": shown(error).partition("\n")[0]}
    repeats, equal = (_first_difference(first, other) for other in (again, ours))
    return {"equal": not equal, "repeats": not repeats, "first_difference": equal or repeats, "reason": reason}


def _outputs(bench: Workbench, cache: Any) -> Outputs:
    """What the first layer's attention gave, forward by forward, until the first token."""
    with _watched(bench.model) as outputs:
        if cache is None:
            bench.plain_run()
        else:
            bench.generate(cache, "ours")
    return outputs


@contextmanager
def _watched(model: Any) -> Iterator[Outputs]:
    outputs: Outputs = []

    def keep(module: object, args: object, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = model.model.layers[0].self_attn.register_forward_hook(reads_only(keep))
    try:
        yield outputs
    finally:
        handle.remove()


def _first_difference(one: Outputs, other: Outputs) -> str:
    """Empty if all bits are equal."""
    if len(one) != len(other):
        return f"{len(one)} forwards against {len(other)}"
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        if a.shape != b.shape or not torch.equal(a, b):
            apart = (a.double() - b.double()).abs().max().item() if a.shape == b.shape else float("nan")
            return f"forward {number}: by up to {apart:g}"
    return ""
