"""A network and a process tree of its own, in which a server that listens on all interfaces cannot be reached from outside.

    unshare --map-root-user --net ... python script.py

The new network has a loopback interface only, which is still down.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import struct
import subprocess
import sys

NAMESPACES = ["unshare", "--map-root-user", "--net", "--pid", "--mount-proc", "--fork", "--kill-child"]
"""The prefix of a command that is to run inside. All processes inside end with it, whatever happens."""

SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1


def bring_up_loopback() -> None:
    """Does what `ip link set lo up` does; to be called inside."""
    import fcntl

    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


def obstacle() -> str:
    """Returns why no Mooncake cluster can be started here in a network of its own; empty if it can."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "Mooncake's servers listen on all interfaces; to keep them in, `unshare` (Linux, util-linux) is needed"
    if importlib.util.find_spec("mooncake") is None:
        return 'the Mooncake client is not installed: pip install "cake-hf[mooncake]"'
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, timeout=30)
    if tried.returncode:
        return f"no network namespace can be made: {tried.stderr.strip()}"
    loaded = subprocess.run([sys.executable, "-c", "import mooncake.store"], capture_output=True, text=True, timeout=60)
    if loaded.returncode:
        return f"the Mooncake client cannot be loaded: {loaded.stderr.strip().splitlines()[-1]} (apt-get install libibverbs1)"
    return ""
