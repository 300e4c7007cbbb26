"""What a cache is at: the prompt that it has to do with, and how far that is.

    IDLE -> RESTORING -> SUFFIX -> IDLE                        a prompt that a forward brings
    IDLE -> RESTORING -> IDLE -> PREFILLED -> SUFFIX -> IDLE   one that `prefill` brings, and `generate` then goes on from
    IDLE -> BATCH -> IDLE                                      several prompts: each row is restored by a cache of its own

In the midst of SUFFIX a load may fail; then it is RESTORING meanwhile, and SUFFIX again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from cake_hf.restore.batch import BatchRestore
from cake_hf.restore.forwards import never
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.restore import Restore


class Phase(Enum):
    """Of a cache."""

    IDLE = "idle"  # no prompt is on its way
    PREFILLED = "prefilled"  # `prefill` has brought a prompt, whose last piece has not come yet
    RESTORING = "restoring"  # a prompt's chunks are being brought: forwards with the cache are the restore's own
    SUFFIX = "suffix"  # a prompt's last piece is in the model
    BATCH = "batch"  # the last pieces of several prompts are in the model


@dataclass(eq=False)  # not frozen: torch.compile would look at all that is in here
class Work:
    """A phase with what belongs to it. Nothing in here is changed: the next phase has a `Work` of its own.

    Attributes:
        phase: of the cache.
        prompt: that was prefilled, or whose last piece is in the model.
        restore: of the chunks before that piece, whose loads may be under way; None where nothing was begun, or `prefill` has
            brought them.
        preempted: whether the chunk that is being computed has come from the store.
        batch: whose last pieces are in the model.
        begin: when the model got the last piece.
        saved: the last piece is a block of the canonical schedule, and becomes known like the others.
        rows: how many equal prompts.
    """

    phase: Phase
    prompt: Prompt | None = None
    restore: Restore | None = None
    preempted: Callable[[], bool] = never
    batch: BatchRestore | None = None
    begin: float = 0.0
    saved: bool = False
    rows: int = 1


IDLE = Work(Phase.IDLE)
