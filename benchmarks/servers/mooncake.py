"""A Mooncake cluster: a master, and a process that lends it memory. To be started in a network of its own."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

from benchmarks.servers.plain import PATIENCE, Unavailable, faceless, free_port

MASTER = [sys.executable, "-m", "mooncake.cli", "--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1"]

LENDER = """
store = MooncakeStore(sys.argv[1])
store.contains(["0" * 40])
print("lent", flush=True)
sys.stdin.read()
"""
"""Script of a process that lends memory until its input ends: also when its parent is killed."""

_numbers = count()


class Cluster:
    """A master, and a process that lends it memory. `end` ends them.

    Args:
        folder: for the files that they write.
        lend: how much.
        options: more of the master's.

    Raises:
        Unavailable: one of them does not come up.
    """

    def __init__(self, folder: Path, lend: str = "512MiB", *options: str) -> None:
        self.options = options
        self.port, self.admin = free_port(), free_port()
        self.log = (folder / "cluster.log").open("ab")
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            self.master = self.start_master()
            self.lender = self.start_lender(lend)
        except BaseException:
            self.end()
            raise

    def start_master(self) -> subprocess.Popen[bytes]:
        """Starts the master, or starts it again after its end."""
        command = [*MASTER, f"--rpc_port={self.port}", f"--metrics_port={self.admin}", *self.options]
        self.processes.append(subprocess.Popen(command, stdout=self.log, stderr=self.log))
        for port in (self.port, self.admin):
            _await_port(port)
        return self.processes[-1]

    def start_lender(self, lend: str) -> subprocess.Popen[bytes]:
        """Starts one more process that lends memory."""
        lender = self.start(LENDER, f"{self.base()}&lend={lend}")
        assert lender.stdout is not None
        ready, _, _ = select.select([lender.stdout], [], [], PATIENCE)
        if not ready or lender.stdout.readline() != b"lent\n":
            raise Unavailable(f"no memory could be lent to Mooncake: {Path(self.log.name).read_text()[-500:]}")
        return lender

    def start(self, script: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a script in a process of its own, with `MooncakeStore` imported."""
        command = faceless(f"from cake_hf.stores.mooncake import MooncakeStore\n{script}", arguments)
        pipe = subprocess.PIPE
        self.processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log))
        return self.processes[-1]

    def base(self, prefix: str = "cake_hf") -> str:
        """The URL of a store in the cluster."""
        return f"mooncake://127.0.0.1:{self.port}/{prefix}?admin={self.admin}"

    def new_url(self) -> str:
        """Returns a URL with an unused prefix."""
        return self.base(f"test-{next(_numbers)}")

    def end(self) -> None:
        """Ends all processes."""
        for process in self.processes:
            process.kill()
            process.wait(PATIENCE)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self.log.close()


def _await_port(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    with socket.socket() as connection:
        while connection.connect_ex(("127.0.0.1", port)):
            if time.monotonic() > deadline:
                raise Unavailable("Mooncake's master did not come up")
            time.sleep(0.01)
