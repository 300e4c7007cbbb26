"""Hooks by which a test takes part in a model's forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cake_hf import reads_only
from cake_hf.testing import GateStore
from waiting import join_loaders


def attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    """One module per layer, each of which updates the cache when it runs."""
    return [module for name, module in model.named_modules() if name.endswith(("self_attn", ".attention"))]


@contextmanager
def before_forward(module: torch.nn.Module, action: Callable[[int], None]) -> Iterator[None]:
    """Call `action(number)` before each run of the module; runs are counted from 1."""
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1
        action(count)

    handle = module.register_forward_pre_hook(reads_only(hook))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def meeting_at(model: torch.nn.Module, gate: GateStore, meeting: int, chunks: int, states: int = 0) -> Iterator[None]:
    """Let the two sides meet exactly there.

    While chunk `meeting - 1` is being computed, the gate opens for the reads of so many chunks and snapshots, and the forward
    goes on only when the one loader has settled them: its next read, a contested one of that chunk, has then come to the gate,
    where it waits until all is over. Snapshots are among the first that are asked for, but each by a thread of its own: so they
    are awaited before the gate opens.
    """
    reads = chunks + states

    def meet(forward: int) -> None:
        if forward == meeting:
            gate.await_begun(states + 1)
            gate.open(reads)
            gate.await_begun(reads + 1)

    try:
        with before_forward(model, meet):
            yield
    finally:
        gate.open()
        join_loaders()
