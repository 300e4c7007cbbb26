"""Runs pytest in a network of its own, where a server that listens everywhere is heard by nobody outside.

    unshare --map-root-user --net ... python own_network.py PYTEST_ARGUMENTS

The new network has a loopback interface only, and that one is still down.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys

SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1


def bring_up_loopback() -> None:
    """As `ip link set lo up`."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


if __name__ == "__main__":
    bring_up_loopback()
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
