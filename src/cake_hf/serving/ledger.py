"""The ledger of one request that is being restored: who makes which chunk. No method waits for a chunk.

`Frontier` does the same for a prompt that has the computing thread to itself, which may therefore wait. The thread that runs an
engine's steps serves other requests meanwhile, so it only looks, at each step, at how far the two sides have come.

A load goes through LOADING (being read into memory of its own) and LANDING (checked, and being copied to the request's blocks).
Only the second one touches the blocks. So a read that is late, or hangs, holds none of them: its chunk is given up, and what it
brings is dropped.

Where layers have sliding windows, the front passes loaded chunks only if the windows before its new place were loaded, too.
Else it stays before chunks that are there, which are computed again if one behind them has to be computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from cake_hf.scheduling.frontier import Outcome


class Chunk(Enum):
    """The state of a chunk."""

    ABSENT = auto()  # not stored, or not usable: has to be computed
    STORED = auto()
    LOADING = auto()
    LANDING = auto()
    LOADED = auto()
    COMPUTING = auto()
    COMPUTED = auto()


THERE = (Chunk.LOADED, Chunk.COMPUTED)
_UNDER_WAY = (Chunk.LOADING, Chunk.LANDING)


@dataclass(frozen=True)
class WindowLoads:
    """Says which loads bring sliding windows.

    Attributes:
        chunks: whose loads bring them.
        reach: how many chunks a window reaches back from the start of a chunk; 0 if no layer has one.
        weight: bytes of such a load over those of another one.
    """

    chunks: frozenset[int] = frozenset()
    reach: int = 0
    weight: float = 1.0


NO_WINDOWS = WindowLoads()


class Load:
    """One load of a chunk.

    Attributes:
        chunk: its index.
        begun: when it was claimed.
    """

    def __init__(self, chunk: int, begun: float) -> None:
        self.chunk = chunk
        self.begun = begun


class Ledger:
    """States of the chunks of one request. Loaders claim from the back, the engine's thread computes from the front.

    Args:
        stored: for each chunk, whether the store has it.
        clock: monotonic seconds.
        windows: which loads bring sliding windows.

    Attributes:
        front: where the request can go on; all chunks before it are there.
        missing: the first chunk that is not there, as `advance` has found it. Beyond `front` only for want of windows.
        again: whether the chunk that is being computed is there.
        progress: when the last load ended, or the first one began.
    """

    def __init__(self, stored: Sequence[bool], clock: Callable[[], float], windows: WindowLoads = NO_WINDOWS) -> None:
        self._states = [Chunk.STORED if has else Chunk.ABSENT for has in stored]
        self._clock = clock
        self._loads: dict[int, Load] = {}
        self._landed = threading.Condition()
        self._over = False
        self.windows = windows
        self.front = self.missing = 0
        self.again = False
        self.progress: float | None = None

    def __len__(self) -> int:
        return len(self._states)

    # The engine's thread.

    def skip(self, count: int) -> None:
        """Notes that the first `count` chunks were found in the engine's memory."""
        with self._landed:
            for index in range(count):
                self._states[index] = Chunk.COMPUTED
            self.front = max(self.front, count)

    def advance(self) -> Chunk | None:
        """Moves the front over what is there; returns the state of the first chunk that is missing, None at the end."""
        with self._landed:
            self.missing = self._first_missing()
            self.front = self._passable(self.missing)
            return self._states[self.missing] if self.missing < len(self._states) else None

    def is_there(self) -> bool:
        """Returns whether `advance` would move the front, or is at the end."""
        with self._landed:
            return self.front >= len(self._states) or self._passable(self._first_missing()) > self.front

    def begin(self) -> bool:
        """Takes the chunk at the front for computing. A load of it that is under way is given up; False if it just landed."""
        with self._landed:
            self.again = self.front < self.missing
            if not self.again and self._states[self.front] not in (Chunk.ABSENT, Chunk.STORED, Chunk.LOADING):
                return False
            self._loads.pop(self.front, None)
            self._states[self.front] = Chunk.COMPUTING
            return True

    def computed(self) -> int:
        """Notes that the chunk at the front was computed; returns its index."""
        with self._landed:
            index = self.front
            self._states[index] = Chunk.COMPUTED
            self.front += 1
            return index

    def put_back(self) -> None:
        """Notes that the chunk at the front was not computed after all."""
        with self._landed:
            self._states[self.front] = Chunk.LOADED if self.again else Chunk.ABSENT

    def give_up_late(self, begun_before: float) -> list[Load]:
        """Gives up the loads that began before then, and all that have not begun. Returns those given up under way."""
        with self._landed:
            late = [load for load in self._loads.values() if load.begun < begun_before and self._is_loading(load)]
            if late:
                for load in late:
                    del self._loads[load.chunk]
                    self._states[load.chunk] = Chunk.ABSENT
                self._close()
            return late

    def close_loading(self) -> None:
        """Ends loading: every chunk whose load has not begun is computed."""
        with self._landed:
            self._close()

    def end(self) -> None:
        """Ends the restore: nothing is claimed and nothing lands any more. Waits for a copy to the blocks that is under way."""
        with self._landed:
            self._over = True
            self._landed.wait_for(lambda: Chunk.LANDING not in self._states)
            self._loads.clear()

    # Loaders.

    def next_load(self) -> int | None:
        """Returns the chunk that would be claimed next; None if there is nothing to load."""
        with self._landed:
            return self._last_stored()

    def claim(self) -> Load | None:
        """Claims the last stored chunk that is not claimed yet; None if there is none."""
        with self._landed:
            index = self._last_stored()
            if index is None:
                return None
            load = self._loads[index] = Load(index, self._clock())
            self._states[index] = Chunk.LOADING
            if self.progress is None or len(self._loads) == 1:
                self.progress = load.begun
            return load

    def land(self, load: Load) -> bool:
        """Returns whether a load that was read may be copied to the request's blocks; `settle` has to follow."""
        with self._landed:
            wanted = not self._over and self._loads.get(load.chunk) is load
            if wanted:
                self._states[load.chunk] = Chunk.LANDING
            return wanted

    def settle(self, load: Load, outcome: Outcome) -> bool:
        """Notes how a load ended; False if it had been given up."""
        with self._landed:
            if self._loads.get(load.chunk) is not load:
                return False
            del self._loads[load.chunk]
            self._states[load.chunk] = Chunk.LOADED if outcome is Outcome.LOADED else Chunk.ABSENT
            self.progress = self._clock()
            self._landed.notify_all()
            return not self._over

    # For decisions.

    def state(self, index: int) -> Chunk:
        """Returns the state of a chunk."""
        with self._landed:
            return self._states[index]

    def loads_left(self) -> float:
        """Returns how many chunks are being loaded or may still be; one that brings windows counts as its bytes do."""
        with self._landed:
            return sum(map(self._weight, range(len(self._states))))

    def loads_under_way(self) -> int:
        """Returns how many chunks are being loaded."""
        with self._landed:
            return len(self._loads)

    def left(self) -> tuple[list[int], list[float]]:
        """Returns the chunks that are not there, and as how many loads each of them counts: 0 if it cannot be loaded."""
        with self._landed:
            chunks = [i for i in range(self.front, len(self._states)) if self._states[i] not in THERE]
            return chunks, [self._weight(i) for i in chunks]

    def idle(self, now: float) -> float:
        """Returns the seconds since a load ended, or the first one began; 0 if none has begun."""
        with self._landed:
            return 0.0 if self.progress is None else max(0.0, now - self.progress)

    def _first_missing(self) -> int:
        there = (index for index in range(self.front, len(self._states)) if self._states[index] not in THERE)
        return next(there, len(self._states))

    def _passable(self, missing: int) -> int:
        """Returns how far the front can go over what is there, up to `missing`."""
        chunks, reach = self.windows.chunks, self.windows.reach
        for place in range(missing, self.front, -1):
            if all(index in chunks for index in range(max(self.front, place - reach), place)):
                return place
        return self.front

    def _weight(self, index: int) -> float:
        if self._states[index] is not Chunk.STORED and self._states[index] not in _UNDER_WAY:
            return 0.0
        return self.windows.weight if index in self.windows.chunks else 1.0

    def _is_loading(self, load: Load) -> bool:
        return self._states[load.chunk] is Chunk.LOADING

    def _close(self) -> None:
        for index, state in enumerate(self._states):
            if state is Chunk.STORED:
                self._states[index] = Chunk.ABSENT

    def _last_stored(self) -> int | None:
        if self._over:
            return None
        for index in range(len(self._states) - 1, self.front - 1, -1):
            if self._states[index] is Chunk.STORED:
                return index
        return None
