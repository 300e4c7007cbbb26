"""Requests that wait for one device: seconds from arrival to first token, and how many requests it serves per second.

The device serves one prompt after the other, each for as long as its method takes alone; decoding happens elsewhere, as where
prefill has nodes of its own. Loading may also run ahead of the device, as engines do that load for waiting requests: then the
line brings one prefix after the other, and the device serves whichever request is ready first.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.traces.methods import Visit, loads


def scaled_arrivals(visits: Sequence[Visit], load: float) -> list[float]:
    """Returns the times of arrival, stretched so that computing everything would use that share of the device.

    Raises:
        ValueError: the share is not above 0.
    """
    if not 0 < load < float("inf"):
        raise ValueError(f"The load must be a number above 0, got {load:g}.")
    span = visits[-1].time - visits[0].time
    factor = sum(visit.compute for visit in visits) / load / span if span else 0.0
    return [(visit.time - visits[0].time) * factor for visit in visits]


def one_by_one(arrivals: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Returns when each request has its first token, if they are served in the order of their arrival."""
    ends, free = [], 0.0
    for arrival, taken in zip(arrivals, seconds, strict=True):
        free = max(arrival, free) + taken
        ends.append(free)
    return ends


def loads_ahead(arrivals: Sequence[float], visits: Sequence[Visit], method: str) -> list[float]:
    """Returns the same for a single method whose loads run while the device computes for others."""
    ready, line = [], 0.0
    for arrival, visit in zip(arrivals, visits, strict=True):
        if loads(method, visit.hits):
            line = max(arrival, line) + visit.line
            ready.append(line)
        else:
            ready.append(arrival)
    order = sorted(range(len(visits)), key=lambda index: (ready[index], index))
    work = [visits[index].rest if loads(method, visits[index].hits) else visits[index].compute for index in order]
    ends = one_by_one([ready[index] for index in order], work)
    found = dict(zip(order, ends, strict=True))
    return [found[index] for index in range(len(visits))]


def waits(arrivals: Sequence[float], ends: Sequence[float]) -> list[float]:
    """Returns the seconds from arrival to first token."""
    return [end - arrival for arrival, end in zip(arrivals, ends, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns mean, median, 90th and 99th percentile (nearest rank)."""
    ordered = sorted(values)
    ranks = {f"p{part}": ordered[-(-part * len(ordered) // 100) - 1] for part in (50, 90, 99)}
    return {"mean": sum(ordered) / len(ordered), **ranks}
