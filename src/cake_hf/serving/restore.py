"""One request that is being restored, as its manager, its loaders and the engine's steps see it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from cake_hf.chunks.codec import ChunkMetadata
from cake_hf.report import Report, Span
from cake_hf.restore.audit import Comparison
from cake_hf.scheduling.costs import Brought
from cake_hf.scheduling.frontier import Outcome
from cake_hf.serving.ledger import Ledger
from cake_hf.util.forks import Lock

if TYPE_CHECKING:
    import torch

    from cake_hf.serving.seams import RequestState

    Pieces = Sequence[torch.Tensor]


class Phase(Enum):
    """The phase of a restore."""

    LOOKING = auto()  # the store is being asked
    WAITING = auto()  # for memory, or for another request that makes the same chunks
    RESTORING = auto()
    HELD = auto()  # all chunks are there; what follows does not join the others' steps yet
    OVER = auto()  # all chunks are there, or it was abandoned: the engine goes on as with any request


@dataclass(eq=False)
class Restore:
    """The restore of one request's prompt.

    Attributes:
        chunks: number of chunks to restore; at least one token is left to run.
        started: when the request came.
        report: counts what happens to it.
        phase: how far it is.
        namespace, keys: of its chunks; empty until they have been looked up.
        stored: which of them the store has.
        saves: whether computed chunks are saved.
        ledger: who makes which chunk.
        state: the engine's, once the restore has been admitted.
        ready_since: since when its front could go on, or has gone on; None while it waits for loads.
        began, ended: when it was admitted, and when all chunks were there; 0 for not yet.
        outcomes: how loads ended that brought nothing, by chunk.
        steps: index and seconds of the chunks that were computed.
        arrivals: when loading began, and when each load arrived.
        took: what was brought for each chunk that was read.
        crowded: whether other restores shared the path to the store meanwhile, so that it shows nothing of its speed.
        first_token: whether the first token of its answer has come.
        recomputed: number of stored chunks that were computed.
        comparisons: the comparisons of such chunks with the store, that are under way.
        unsaved: computed chunks that are to be saved if these find nothing, and the windows of each.
        windows: what loads have brought of sliding windows, by chunk, until the front has passed it.
    """

    request_id: str
    tokens: list[int]
    chunks: int
    started: float
    report: Report
    phase: Phase = Phase.LOOKING
    namespace: str = ""
    keys: list[str] = field(default_factory=list)
    stored: Sequence[bool] = ()
    saves: bool = False
    ledger: Ledger | None = None
    state: RequestState | None = None
    ready_since: float | None = None
    began: float = 0.0
    ended: float = 0.0
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    steps: list[tuple[int, float]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    took: dict[int, Brought] = field(default_factory=dict)
    crowded: bool = False
    first_token: bool = False
    recomputed: int = 0
    comparisons: list[Comparison] = field(default_factory=list)
    unsaved: dict[int, Pieces] = field(default_factory=dict)
    windows: dict[int, Pieces] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=Lock)

    def found(self) -> None:
        """Notes that the store was asked; the restore now waits for memory, unless it was abandoned meanwhile."""
        with self._lock:
            if self.phase is Phase.LOOKING:
                self.phase = Phase.WAITING

    def over(self) -> None:
        """Leaves the request to the engine."""
        with self._lock:
            self.phase = Phase.OVER

    def metadata(self, index: int, model: str) -> ChunkMetadata:
        """Returns the metadata of a chunk, without its checksums."""
        parent = self.keys[index - 1] if index else self.namespace
        return ChunkMetadata(self.keys[index], parent, index, self.namespace, model)

    def record(self, actor: str, chunk: int, begin: float, end: float, outcome: str) -> None:
        """Adds a chunk's work to the report's timeline."""
        self.report.timeline.append(Span(actor, chunk, begin - self.started, end - self.started, outcome))

    def shared_with(self, other: Restore) -> int:
        """Returns how many chunks from the start the two prompts have in common."""
        pairs = zip(self.keys, other.keys, strict=False)
        return next((n for n, (mine, its) in enumerate(pairs) if mine != its), min(len(self.keys), len(other.keys)))
