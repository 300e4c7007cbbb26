"""Redis commands with large values, transferred directly between a socket and the caller's buffers.

A client that returns values as objects copies each value, and takes the GIL once per piece that the socket delivers; the
model's forward waits for the GIL. Here one blocking system call transfers a value.

A value is stored in slices, which a small key, its manifest, describes.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cake_hf.stores.pieces import after

IOV_MAX = os.sysconf("SC_IOV_MAX")
SHORTEST_LINE = 4
"""Bytes of `$1` and the end of its line: what can be read before the kind of line is known."""

MAX_LINE = 2**12
"""Most bytes of an error's line that are read."""


_NOTHING = {b"$-1\r": 1, b"$0\r\n": 2}
"""Starts of answers without a value, with the number of bytes that follow."""


class Refused(Exception):
    """The server answered with an error; the message is its text."""


class Unfit(Exception):
    """The server has a value, but not of the expected length."""


class Wire:
    """One connected socket, used by one thread at a time.

    While answers are under way, and after any exception, the socket cannot be reused and has to be closed.

    Args:
        connection: a connected and authenticated socket, without pending replies.
        timeout: seconds after which an unfinished transfer of a value is given up.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self._socket = connection
        self.under_way = 0
        """Number of answers that have been requested but not read."""
        self._timeout = timeout
        self._tls = isinstance(connection, ssl.SSLSocket)
        if self._tls:
            connection.settimeout(timeout)
            return
        # With a timeout set in Python, the socket is non-blocking, and a large value arrives in many small pieces. With the
        # kernel's own timeouts the socket can block.
        connection.settimeout(None)
        seconds, fraction = divmod(timeout, 1)
        limit = struct.pack("@ll", int(seconds), int(fraction * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def ask(self, *words: bytes) -> None:
        """Sends a command without waiting for its answer.

        Raises:
            OSError: the connection is broken or timed out.
        """
        self.under_way += 1
        self._send([memoryview(_command(words))])

    def store(self, words: Sequence[bytes], value: Sequence[memoryview], options: Sequence[bytes] = ()) -> None:
        """Sends a command with a scattered value, and waits for its OK.

        Args:
            words: words of the command before the value.
            value: buffers with the value, in order.
            options: words of the command after the value.

        Raises:
            Refused: the server refused the command; the message says why.
            OSError: the connection is broken or timed out.
        """
        count, size = len(words) + 1 + len(options), sum(view.nbytes for view in value)
        self.under_way += 1
        start = b"*%d\r\n" % count + _bulks(words) + b"$%d\r\n" % size
        self._send([memoryview(start), *value, memoryview(b"\r\n" + _bulks(options))])
        self._expect(b"+OK\r\n")
        self.under_way -= 1

    def receive(self, value: Sequence[memoryview]) -> bool:
        """Reads the next answer, a value exactly as long as all buffers together, into the buffers.

        Returns:
            False if the server has no such value. (If a part of a value was requested, it answers with an empty value.)

        Raises:
            Unfit: the value has another length.
            Refused: the server answered with an error.
            OSError: the connection is broken, or the value does not arrive in time.
        """
        size = sum(view.nbytes for view in value)
        found = self._expect(b"$%d\r\n" % size)
        if found:
            self._fill([*value, memoryview(bytearray(2))])
        self.under_way -= 1
        return found

    def _expect(self, line: bytes) -> bool:
        """Reads a reply's first line, which should equal `line`; returns False if it says that there is no value."""
        begin = self._take(SHORTEST_LINE)
        if begin[:1] == b"-":
            raise Refused(self._rest_of_line(begin))
        if begin in _NOTHING:
            self._take(_NOTHING[begin])
            return False
        # If the line announces a value of two digits or more, it and the value are longer than what is left of our line.
        rest = b"" if begin.endswith(b"\n") else self._take(len(line) - len(begin))
        if begin + rest != line:
            raise Unfit
        return True

    def _rest_of_line(self, line: bytes) -> str:
        while not line.endswith(b"\n") and len(line) < MAX_LINE:
            line += self._take(1)
        return line[1:].decode(errors="replace").strip()

    def _take(self, count: int) -> bytes:
        buffer = bytearray(count)
        self._fill([memoryview(buffer)])
        return bytes(buffer)

    def _fill(self, views: list[memoryview]) -> None:
        deadline = time.monotonic() + self._timeout
        views = [view for view in views if view.nbytes]
        while views:
            if self._tls:
                count = self._socket.recv_into(views[0])
            else:
                count = self._socket.recvmsg_into(views[:IOV_MAX], 0, socket.MSG_WAITALL)[0]
            if count == 0:
                raise ConnectionError("the server closed the connection")
            views = self._left(views, count, deadline)

    def _send(self, views: list[memoryview]) -> None:
        deadline = time.monotonic() + self._timeout
        while views:
            count = self._socket.send(views[0]) if self._tls else self._socket.sendmsg(views[:IOV_MAX])
            views = self._left(views, count, deadline)

    def _left(self, views: list[memoryview], count: int, deadline: float) -> list[memoryview]:
        """Returns the views still to be transferred; raises after the deadline, so that a trickling value is given up, too."""
        views = after(views, count)
        if views and time.monotonic() > deadline:
            raise TimeoutError(f"{sum(view.nbytes for view in views)} bytes were left after {self._timeout:g} s")
        return views


def _command(words: Sequence[bytes]) -> bytes:
    return b"*%d\r\n" % len(words) + _bulks(words)


def _bulks(words: Sequence[bytes]) -> bytes:
    return b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


MANIFEST_BYTES = 63
"""Index of the last byte of a manifest that is read. Ours are shorter; for others no more memory is used."""

MAX_SLICES = 2**16
"""Most slices of a value; a manifest that claims more is not ours."""


@dataclass(frozen=True)
class Manifest:
    """A value's size and slices.

    Attributes:
        size: bytes of the value.
        slice_bytes: bytes of each slice except the last.
        tag: tag in the names of the slices.
    """

    size: int
    slice_bytes: int
    tag: str

    def encode(self) -> bytes:
        """Returns the manifest as it is stored."""
        return f"1 {self.size} {self.slice_bytes} {self.tag}".encode()

    @classmethod
    def parse(cls, raw: bytes) -> Manifest | None:
        """Parses a stored manifest; returns None if it is missing or not ours."""
        match = re.fullmatch(rb"1 (\d{1,15}) ([1-9]\d{0,9}) ([0-9a-f]{16})", raw)
        if match is None:
            return None
        found = cls(int(match[1]), int(match[2]), match[3].decode())
        return found if found.size <= found.slice_bytes * MAX_SLICES else None

    @property
    def sizes(self) -> list[int]:
        """Bytes of each slice."""
        full, rest = divmod(self.size, self.slice_bytes)
        return [self.slice_bytes] * full + [rest] * (rest > 0)

    def ranges(self, offset: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Iterates over the parts of slices that make up `count` bytes from an offset in the value: (slice, begin, end)."""
        end = offset + count
        for number in range(offset // self.slice_bytes, -(-end // self.slice_bytes) if count else 0):
            start = number * self.slice_bytes
            yield number, max(offset - start, 0), min(end - start, self.slice_bytes)
