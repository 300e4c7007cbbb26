"""The phases of a cache: the prompt that it works on, and how far that has come.

    IDLE -> RESTORING -> SUFFIX -> IDLE                        a prompt that a forward brings
    IDLE -> RESTORING -> IDLE -> PREFILLED -> SUFFIX -> IDLE   a prompt that `prefill` brings and `generate` continues from
    IDLE -> BATCH -> IDLE                                      several prompts: each row is restored by a cache of its own

If a load fails during SUFFIX, the phase is RESTORING while its chunk is computed, and then SUFFIX again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from cake_hf.restore.batch import BatchRestore
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.restore import Restore


class Phase(Enum):
    """The phase of a cache."""

    IDLE = "idle"  # no prompt is being worked on
    PREFILLED = "prefilled"  # `prefill` has brought a prompt, whose suffix has not come yet
    RESTORING = "restoring"  # a prompt's chunks are being restored: forwards with the cache are the restore's own
    SUFFIX = "suffix"  # a prompt's suffix is in the model
    BATCH = "batch"  # the suffixes of several prompts are in the model


@dataclass(eq=False)  # not frozen: torch.compile would inspect every field
class Work:
    """A phase and the data that belongs to it. A `Work` is not changed: the next phase has one of its own.

    Attributes:
        prompt: the prompt that was prefilled, or whose suffix is in the model.
        restore: of the chunks before the suffix, whose loads may be under way; None if no restore was started, or `prefill` has
            brought them.
        preempted: returns whether the chunk that is being computed has come from the store; None if none is computed.
        batch: the batch whose suffixes are in the model.
        begin: when the model got the suffix.
        saved: the suffix is a block of the canonical schedule, and becomes known like the others.
        rows: how many equal prompts.
    """

    phase: Phase
    prompt: Prompt | None = None
    restore: Restore | None = None
    preempted: Callable[[], bool] | None = None
    batch: BatchRestore | None = None
    begin: float = 0.0
    saved: bool = False
    rows: int = 1


IDLE = Work(Phase.IDLE)
