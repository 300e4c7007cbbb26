"""Measures Mooncake with a cluster of its own in a network of its own, since Mooncake listens on all interfaces.

python -m benchmarks.stores.own_cluster SETTINGS      (inside; prints the result as one line of JSON)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.children import environment
from benchmarks.figures import Figure, Goal, Result
from benchmarks.servers import Unavailable
from benchmarks.servers.mooncake import Cluster
from benchmarks.servers.own_network import NAMESPACES, bring_up_loopback, obstacle
from benchmarks.stores import remote
from benchmarks.stores.race import race
from benchmarks.stores.values import StoreSettings, Values
from cake_hf.errors import CakeError

SECONDS = 300.0
"""Seconds after which the measurement is given up."""

LEASE = "--default_kv_lease_ttl=60s"
"""A lease must outlast any read."""


def measure(settings: StoreSettings) -> Result:
    """Measures in a process inside a network of its own.

    Raises:
        Unavailable: this machine has no Mooncake, or cannot make such a network.
        CakeError: the measurement failed.
    """
    if reason := obstacle():
        raise Unavailable(reason)
    command = [*NAMESPACES, sys.executable, "-m", __name__, json.dumps(settings.as_dict())]
    try:
        ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CakeError(f"Mooncake could not be measured within {SECONDS:g} s.") from error
    lines = ended.stdout.splitlines()
    if ended.returncode or not lines:
        told = ended.stderr.strip().splitlines()
        raise CakeError(f"Mooncake could not be measured: {told[-1] if told else 'it said nothing'}")
    return from_json(json.loads(lines[-1]))


def from_json(told: dict[str, Any]) -> Result:
    """Returns a result from what `asdict` and JSON made of it."""

    def figure(fields: dict[str, Any]) -> Figure:
        return Figure(**{**fields, "goal": Goal(**fields["goal"]) if fields["goal"] else None})

    figures = {name: figure(fields) for name, fields in told["figures"].items()}
    return Result(told["title"], figures, told["details"], told["failure"])


def main() -> None:
    """Runs inside: brings up the network, starts a cluster, measures, prints the result."""
    bring_up_loopback()
    settings = StoreSettings(**json.loads(sys.argv[1]))
    values = Values(settings)
    room = 2 * values.total // 2**20 + 64
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), f"{room}MiB", LEASE)
        try:
            with remote.mooncake(values, settings, Path(folder), cluster.base()) as contender:
                result = race(contender, values, settings)
                print(json.dumps(asdict(result)), flush=True)
        finally:
            cluster.end()


if __name__ == "__main__":
    main()
