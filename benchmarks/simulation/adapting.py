"""Loads that choose among forms of a chunk, so that a restore is over in time: CacheGen's adaptation at both ends.

Source: CacheGen (Liu et al., SIGCOMM 2024). Its rule, `scheduling.codecs.finest`, is asked at each claim with the bandwidth of
the last arrival. What computing will have made by then need not be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cake_hf.scheduling.codecs import finest
from cake_hf.scheduling.costs import CodecCost, Costs, LoadCost
from cake_hf.scheduling.pace import Pace


class Adapting(Pace):
    """The pace of a restore that has a time to keep.

    Args:
        costs: as learnt; of raw chunks.
        forms: of each chunk, the finest first.
        max_ttft: seconds after which the first token should be there.
        gives_up: whether nothing more is loaded once no form is in time, since what is computed is at least exact; otherwise
            the coarsest form is.

    Attributes:
        form: chosen for the load that is claimed now, by its number.
    """

    def __init__(
        self, costs: Costs, *, forms: Sequence[CodecCost], max_ttft: float, gives_up: bool, **beliefs: Any
    ) -> None:
        super().__init__(costs, **beliefs)
        self._forms, self._max_ttft, self._gives_up = forms, max_ttft, gives_up
        self._bandwidth: float | None = None
        self._came = 0.0
        self.form = 0

    def came(self, nbytes: int, begin: float, now: float) -> None:
        """Notes that the bytes of a load that began then have come off the line."""
        if now > (since := max(self._came, begin)):
            self._bandwidth = max(1.0, nbytes / (now - since))
        self._came = now

    def slack(self, front: int, chunk: int, loads: int, now: float) -> float:
        chosen = self._choice(front, chunk - front + loads, now)
        if chosen is None:
            return 0.0
        self.form = chosen
        return super().slack(front, chunk, loads, now)

    def worth(self, chunk: int, loads_left: int, now: float, *, whole: bool = False) -> bool:
        if self._choice(chunk, loads_left, now) is None:
            return True
        return super().worth(chunk, loads_left, now, whole=whole)

    def _choice(self, front: int, left: int, now: float) -> int | None:
        """The form in which the chunks that are left come in time, except for those that computing makes until then."""
        seconds = self._max_ttft - self._following - now
        loads = self._loads()
        chosen = finest(loads, max(1, left - self._computed_in(front, left, seconds)), seconds)
        return chosen if chosen is not None or self._gives_up else len(loads) - 1

    def _computed_in(self, front: int, left: int, seconds: float) -> int:
        if self._compute is None or not math.isfinite(seconds):
            return 0
        return sum(self._compute_seconds(front, count) <= seconds for count in range(1, left + 1))

    def _loads(self) -> list[LoadCost]:
        """What loading costs now in each form."""
        if self._load is None:
            return []
        raw = self._load if self._bandwidth is None else replace(self._load, bandwidth=self._bandwidth)
        return [form.load(raw) for form in self._forms]

    def _wait(self, left: int, now: float) -> float | None:
        """As for any restore, but for the chosen form at the present bandwidth."""
        loads = self._loads()
        if not loads or left < 1 or self._began is None:
            return None
        return max(0.0, loads[self.form].finish(left) - (now - max(self._came, self._began)))
