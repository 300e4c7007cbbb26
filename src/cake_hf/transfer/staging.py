"""Host memory that chunks pass through: a few slots that are reused in turn, so that nothing is allocated per chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from cake_hf.chunks.aligned_memory import empty_aligned
from cake_hf.util.forks import Lock
from cake_hf.util.interrupts import faults_suppressed


class Slot:
    """Memory for one chunk.

    Args:
        nbytes: size of the memory.
        pinned: whether it is page-locked; if the system locks no more pages, it is not, and copies take longer.

    Attributes:
        memory: `[nbytes]` uint8 on the host.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        # Not an inference tensor: threads outside inference mode write to it.
        with torch.inference_mode(False):
            locked = _locked(nbytes) if pinned else None
            self.memory = empty_aligned([nbytes], torch.uint8) if locked is None else locked
        self._copied: list[torch.cuda.Event] = []

    def copied_by(self, marks: Sequence[torch.cuda.Event]) -> None:
        """Sets the events of the copies from or to the memory that must be done before it is used again."""
        self._copied = list(marks)

    def await_copy(self) -> None:
        """Blocks until the memory may be used."""
        for copied in self._copied:
            copied.synchronize()


class SlotRing:
    """Slots that are taken, filled, copied from on the device, and given back before that copy is done.

    The slot that was given back first is taken first. New slots are made only while there are fewer than `slots`, or if all are
    taken: their users have a bound of their own. Pinned memory comes from torch's caching allocator, so the next restore's ring
    costs nothing.

    Args:
        nbytes: of a chunk.
        slots: number of slots that are reused in turn.
        pinned: whether they are page-locked, so that a device can copy from them at full speed, concurrently with other work.
    """

    def __init__(self, nbytes: int, slots: int, *, pinned: bool) -> None:
        self._nbytes = nbytes
        self._slots = slots
        self._pinned = pinned
        self._lock = Lock()
        self._free: deque[Slot] = deque()
        self._made = 0
        self._over = False

    def take(self) -> Slot:
        """Returns a slot that is not in use; may wait for the copy from it."""
        with self._lock:
            slot = self._free.popleft() if self._free and self._made >= self._slots else None
            self._made += slot is None
        if slot is None:
            return Slot(self._nbytes, pinned=self._pinned)
        slot.await_copy()
        return slot

    def give_back(self, slot: Slot) -> None:
        """Takes back a slot that the caller no longer writes to."""
        with self._lock:
            if not self._over:
                self._free.append(slot)

    def let_go(self) -> None:
        """Ends the reuse: a slot still in use is freed by its last user."""
        with self._lock:
            self._over = True
            self._free.clear()


def _locked(nbytes: int) -> torch.Tensor | None:
    with faults_suppressed(RuntimeError):
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    return None
