"""The limit: how fast any split of a prefix into a computed front and a loaded back can be (Jin et al., ICML 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def optimum(compute_seconds: Sequence[float], load_seconds: float, suffix_seconds: float = 0.0) -> float:
    """T*: the least time to first token when chunks are computed from the front and loaded from the back at once.

    With the first m of n chunks computed and the others loaded, both sides are done after
    `max(f_0 + ... + f_(m-1), (n - m) * l)` seconds. The best m is the limit; the suffix comes after it.

    Args:
        compute_seconds: f_i, seconds to compute chunk i.
        load_seconds: l, seconds to load any one chunk (bytes over bandwidth).
        suffix_seconds: S, seconds to run the prompt's last piece once its prefix is there.
    """
    n = len(compute_seconds)
    computed = accumulate(compute_seconds, initial=0.0)
    return min(max(front, (n - m) * load_seconds) for m, front in enumerate(computed)) + suffix_seconds
