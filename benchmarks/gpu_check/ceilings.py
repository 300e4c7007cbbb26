"""What the machine can do at best, measured with torch and the system alone: what all other figures are to be seen beside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.figures import Figure
from benchmarks.gpu_check.desk import Desk
from benchmarks.timing import Sample
from benchmarks.workbench import synchronize

GIGA = 10**9
TERA = 10**12
ROUNDS = 3
BLOCK = 2**24
"""Bytes that are written and read at a time."""


def run(desk: Desk) -> None:
    """Measure all of it."""
    sizes, figures = desk.sizes, {}
    for name, label, rate in (*_copies(desk), ("matmul", "matrix product, TFLOP/s", _product(desk))):
        figures[name] = Figure.of(label, rate(), "").as_dict()
        desk.keep({"figures": figures})
    for name, label, sample in _disk(desk.folder / "file", sizes.copied):
        figures[name] = Figure.of(label, sample, "").as_dict()
    desk.keep({"figures": figures})


def _copies(desk: Desk) -> list[tuple[str, str, Callable[[], Sample]]]:
    device, size = desk.sizes.device, desk.sizes.copied
    locked = device != "cpu"
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=locked)
    there, plain = torch.zeros(size, dtype=torch.uint8, device=device), torch.zeros(size, dtype=torch.uint8)

    def copied(target: torch.Tensor, source: torch.Tensor) -> Callable[[], Sample]:
        return lambda: _rates(lambda: target.copy_(source, non_blocking=True), size / GIGA, device)

    return [
        ("to_device", "page-locked memory to the device, GB/s", copied(there, host)),
        ("from_device", "device to page-locked memory, GB/s", copied(host, there)),
        ("plain_to_device", "ordinary memory to the device, GB/s", copied(there, plain)),
        ("on_host", "memory to memory on the host, GB/s", copied(host, plain)),
    ]


def _product(desk: Desk) -> Callable[[], Sample]:
    rows, device = desk.sizes.matrix, desk.sizes.device
    dtype = getattr(torch, desk.sizes.dtype)
    matrix = torch.randn(rows, rows, device=device, dtype=dtype)  # random: zeros may be faster
    return lambda: _rates(lambda: matrix @ matrix, 2 * rows**3 / TERA, device)


def _rates(work: Callable[[], object], amount: float, device: str) -> Sample:
    """Amount per second, after one round that does not count."""
    rates = []
    for _ in range(1 + ROUNDS):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        rates.append(amount / (time.perf_counter() - begin))
    return Sample(tuple(rates[1:]))


def _disk(path: Path, size: int) -> list[tuple[str, str, Sample]]:
    """One file, written until it is durable, and read back from the page cache."""
    block = memoryview(os.urandom(min(BLOCK, size)))
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    written = time.perf_counter() - begin
    memory = memoryview(bytearray(len(block)))
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(memory):
            pass
    read = time.perf_counter() - begin
    path.unlink()
    rates = {name: Sample((size / GIGA / seconds,)) for name, seconds in (("written", written), ("read", read))}
    return [
        ("disk_written", "a file written and made durable, GB/s", rates["written"]),
        ("disk_read", "the same file read, from the page cache, GB/s", rates["read"]),
    ]
