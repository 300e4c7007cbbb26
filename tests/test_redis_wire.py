"""Large values between a socket and buffers: the other end of the socket is the test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cake_hf.stores.redis_wire import Refused, Unfit, Wire
from cake_hf.testing.contract import value_of

PATIENCE = 20.0


@pytest.fixture
def ends() -> Iterator[tuple[Wire, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(PATIENCE)
        yield Wire(ours, PATIENCE), theirs


def buffers(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


def test_a_command_is_sent_as_words(ends: tuple[Wire, socket.socket]) -> None:
    wire, server = ends
    wire.ask(b"GET", b"name")
    assert server.recv(100) == b"*2\r\n$3\r\nGET\r\n$4\r\nname\r\n"
    assert wire.under_way == 1


def test_a_scattered_value_is_sent_in_its_place(ends: tuple[Wire, socket.socket]) -> None:
    wire, server = ends
    server.sendall(b"+OK\r\n")
    wire.store([b"SET", b"name"], [memoryview(b"ab"), memoryview(b"cde")], [b"EX", b"9"])
    assert server.recv(100) == b"*5\r\n$3\r\nSET\r\n$4\r\nname\r\n$5\r\nabcde\r\n$2\r\nEX\r\n$1\r\n9\r\n"
    assert wire.under_way == 0


@pytest.mark.parametrize("sizes", [[1], [9], [10], [99], [100], [3, 4], [1000] * 3, [1] * 5000])
def test_a_value_comes_into_the_buffers(ends: tuple[Wire, socket.socket], sizes: list[int]) -> None:
    wire, server = ends
    value = value_of(1, sum(sizes))
    server.sendall(b"$%d\r\n%b\r\n" % (len(value), value))
    server.sendall(b"$3\r\nend\r\n")
    parts = buffers(*sizes)
    assert wire.receive(parts) is True
    assert b"".join(parts) == value
    last = buffers(3)
    assert wire.receive(last) is True
    assert bytes(last[0]) == b"end"


def test_a_large_value_crosses_in_both_directions(ends: tuple[Wire, socket.socket]) -> None:
    """More than a socket holds, so that neither side can send it at once."""
    wire, server = ends
    value = value_of(2, 8 * 2**20)
    echoed: list[bytes] = []

    def serve() -> None:
        expected = len(b"*2\r\n$1\r\nX\r\n$8388608\r\n") + len(value) + 2
        got = b""
        while len(got) < expected:
            got += server.recv(2**16)
        echoed.append(got)
        server.sendall(b"+OK\r\n$%d\r\n%b\r\n" % (len(value), value))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    wire.store([b"X"], [memoryview(value)[:5], memoryview(value)[5:]])
    parts = buffers(2**22, 2**22)
    assert wire.receive(parts)
    thread.join(PATIENCE)
    assert echoed[0].endswith(value + b"\r\n")
    assert b"".join(parts) == value


@pytest.mark.parametrize("answer", [b"$-1\r\n", b"$0\r\n\r\n"])
def test_a_refused_answer_leaves_the_next_one_readable(ends: tuple[Wire, socket.socket], answer: bytes) -> None:
    wire, server = ends
    wire.ask(b"GET", b"name")
    wire.ask(b"GET", b"other")
    server.sendall(answer + b"$2\r\nab\r\n")
    assert wire.receive(buffers(10)) is False
    after = buffers(2)
    assert wire.receive(after) is True
    assert bytes(after[0]) == b"ab"
    assert wire.under_way == 0


@pytest.mark.parametrize(("there", "wanted"), [(5, 6), (6, 5), (1, 100), (100, 1), (41943, 4194304), (4194304, 41943)])
def test_a_value_of_another_length_does_not_fit(ends: tuple[Wire, socket.socket], there: int, wanted: int) -> None:
    wire, server = ends
    wire.ask(b"GET", b"name")
    whole = b"$%d\r\n%b\r\n" % (there, bytes(there))
    server.sendall(whole[:100])
    with pytest.raises(Unfit):
        wire.receive(buffers(wanted))
    assert wire.under_way == 1


def test_an_error_is_raised_with_its_text(ends: tuple[Wire, socket.socket]) -> None:
    wire, server = ends
    server.sendall(b"-OOM command not allowed\r\n")
    with pytest.raises(Refused, match=r"^OOM command not allowed$"):
        wire.receive(buffers(10))


def test_an_endless_error_is_not_read_to_its_end(ends: tuple[Wire, socket.socket]) -> None:
    wire, server = ends
    server.sendall(b"-" + b"x" * 10_000)
    with pytest.raises(Refused):
        wire.receive(buffers(10))


def test_a_connection_that_ends_is_an_error(ends: tuple[Wire, socket.socket]) -> None:
    wire, server = ends
    server.sendall(b"$100\r\nonly so much")
    server.close()
    with pytest.raises(ConnectionError):
        wire.receive(buffers(100))


def test_a_server_that_stops_answering_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire = Wire(ours, 0.05)
        theirs.sendall(b"$100\r\nonly so much")
        with pytest.raises(OSError, match=r"bytes were left|temporarily unavailable"):
            wire.receive(buffers(100))
        with pytest.raises(OSError, match=r"bytes were left|temporarily unavailable"):
            wire.store([b"SET", b"x"], buffers(2**24))


class Counting(socket.socket):
    """Counts how often it is asked for bytes."""

    calls = 0

    def recvmsg_into(self, *arguments: Any) -> Any:
        self.calls += 1
        return super().recvmsg_into(*arguments)


def test_a_large_value_is_received_in_one_call() -> None:
    """It is many times larger than what a socket holds; each call would take Python's lock anew."""
    ours, theirs = socket.socketpair()
    value, parts = value_of(3, 4 * 2**20), buffers(100, 2**20, 3 * 2**20 - 100)
    with Counting(fileno=ours.detach()) as counting, theirs:
        answer = b"$%d\r\n%b\r\n" % (len(value), value)
        sender = threading.Thread(target=theirs.sendall, args=(answer,), daemon=True)
        sender.start()
        assert Wire(counting, PATIENCE).receive(parts)
        sender.join(PATIENCE)
        assert b"".join(parts) == value
        assert counting.calls == 3  # twice for the line with the length
