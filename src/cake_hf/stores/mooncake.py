"""A store in a Mooncake cluster (`mooncake://`): memory lent by many machines, managed by one master.

    <prefix>/3fa9...e1      a chunk; the master shows it only once it is complete

A reader gets a lease (10 seconds by default) on each value that it reads or looks up; the value is not removed meanwhile.
"""

from __future__ import annotations

import re
import secrets
import time
import urllib.request
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np

from cake_hf.errors import CorruptChunk, StoreError
from cake_hf.stores.base import Part, Store, total_bytes
from cake_hf.stores.mooncake_client import (
    LEASE_EXPIRED,
    LEASED,
    NOT_FOUND,
    NOT_READY,
    REFUSED,
    MooncakeAddress,
    check,
    join,
    leave,
    native_client,
)
from cake_hf.stores.pieces import address_of
from cake_hf.util.redaction import shown

MOST_PIECES = 256
"""Most pieces of one transfer. The client puts each piece into a queue of 2,048 and fails if the queue is full."""

LEASE_SECONDS = 15.0
"""How long a removal waits for leases to expire: longer than the master's default lease."""

LOOK_AGAIN_SECONDS = 0.02
"""Interval at which a removal checks whether the leases have expired."""

ATTEMPTS = 3
"""Attempts to read a value whose lease expires during the read."""

LISTING_SECONDS = 30.0
"""How long the master may take to list its keys."""

MISSES = (NOT_FOUND, NOT_READY)
_KEY = re.compile(r"[0-9a-f]{40}")

Transfer = Callable[[Any, list[int], list[int]], int]
"""Called with the client, addresses and sizes; returns the client's answer: a number of bytes, or an error code."""


class MooncakeStore(Store):
    """A store in a Mooncake cluster. Opening it does not contact the cluster; the first call joins it.

    It does not guarantee the following, since Mooncake does not:

    * *Durability.* A value lives in the memory of one lending process, or of `replicas` such processes, and is lost with the
      last of them (until the master notices that a process is gone, after 10 seconds by default, reads and writes sent there
      fail). A master that ends loses everything. When the memory is full, the master evicts the values used least. Lend
      memory from long-lived processes (`mooncake_client`, or a store with `lend` that stays open), and combine it with a
      directory or a bucket (see `TierStore`) for values that have to last.
    * *Immediate deletion.* `delete`, and `write` with `replace`, wait at most `lease_seconds` until no reader has a lease on
      the value; then they raise a `StoreError`. (Mooncake's own replacement changes values during reads, so it is not used.)
    * *A single winner.* If two writers write one key at the same time, both may be told that they wrote it.
    * *Empty values*: they are refused.

    The client listens on all network interfaces, and so does the master: use it only in networks in which you trust everybody.

    Args:
        url: `mooncake://master:50051/prefix`; the prefix (default "cake_hf") keeps the keys apart from others in the cluster.
            Options after the `?`: `lend` (memory that this process lends, such as 4GB; default none), `replicas` (default 1),
            `protocol` ("tcp"; or "rdma", with `devices`), `metadata` (default "P2PHANDSHAKE"), `host` (address at which others
            reach this machine; by default the address from which it reaches the master), `admin` (the master's metrics port,
            through which keys are listed; default 9003).
        lease_seconds: how long removals wait for readers; longer than the master's --default_kv_lease_ttl.
        register: whether to register each piece of memory with the client before its use, as RDMA requires; by default for
            protocols other than TCP.

    Raises:
        StoreError: the URL or an option is invalid, or the client is not installed.
    """

    reads_ranges = True
    range_seconds = 1e-3  # two answers from machines nearby

    def __init__(self, url: str, *, lease_seconds: float = LEASE_SECONDS, register: bool | None = None) -> None:
        address = MooncakeAddress.parse(url)
        native_client()  # fails at once if the client is not installed
        self._address = address
        self._lease_seconds = lease_seconds
        self._register = address.settings.protocol != "tcp" if register is None else register
        self._member = join(address.settings)
        self._leave = weakref.finalize(self, leave, self._member)
        self._leave.atexit = False  # `mooncake_client` leaves at exit, for all stores at once

    def __repr__(self) -> str:
        return f"MooncakeStore({self._address.place!r})"

    def identity(self) -> Hashable:
        return (type(self).__name__, self._address.place)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        if not keys:
            return []
        with self._member.client() as client:
            codes = client.batch_is_exist([self._name(key) for key in keys])
        return [check(code, f"Chunks cannot be looked up in {self._address.place}") == 1 for code in codes]

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        name, expected = self._name(key), total_bytes(parts)

        def read(client: Any, addresses: list[int], sizes: list[int]) -> int:
            return int(client.batch_get_into_multi_buffers([name], [addresses], [sizes])[0])

        count = self._transfer(parts, read) if expected else REFUSED
        if count < 0 and count not in MISSES:  # The error code for a wrong size varies.
            size = self.size(key)
            count = NOT_FOUND if size is None else count if size == expected else size
        if count in MISSES:
            return None
        if check(count, self._sentence("read", key)) != expected:
            raise CorruptChunk(f"Chunk {key} has {count} bytes, {expected} were expected.")
        return count

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        name, size, wanted = self._name(key), self.size(key), total_bytes(parts)
        if size is None:
            return False
        if offset + wanted > size:
            raise CorruptChunk(f"Chunk {key} ended early.")

        def read(client: Any, addresses: list[int], sizes: list[int]) -> int:
            each = len(addresses)
            begins = [[[begin]] for begin in accumulate(sizes[:-1], initial=offset)]
            counts = client.get_into_ranges(addresses, [[name]] * each, [[[0]]] * each, begins, [[[n]] for n in sizes])
            return min(int(count) for keys in counts for ranges in keys for count in ranges)

        code = self._transfer(parts, read, register=True) if wanted else 0
        if code not in MISSES:
            check(code, self._sentence("read", key))
        return code not in MISSES

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        """Writes like the contract, except for the guarantees that the class lacks.

        Raises:
            StoreError: the value is empty or cannot be written, or readers never release the old value.
        """
        if not total_bytes(parts):
            raise StoreError("Mooncake keeps no empty values.")
        if replace:
            self.delete(key)
        elif self.contains([key])[0]:
            return False
        check(self._put(self._name(key), parts), self._sentence("written", key))
        # The client reports success to a second writer even if the first one never finishes.
        return self.contains([key])[0]

    def delete(self, key: str) -> bool:
        """Removes a key once no reader has a lease on it.

        Raises:
            StoreError: the key cannot be removed, or readers never release it.
        """
        code = self._remove(self._name(key))
        if code not in MISSES:
            check(code, self._sentence("deleted", key))
        return code not in MISSES

    def keys(self) -> Iterator[str]:
        """Iterates over all keys under the prefix, as listed at the master's metrics port.

        Raises:
            StoreError: the port does not answer.
        """
        straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with straight.open(self._address.listing, timeout=LISTING_SECONDS) as answer:
                names = answer.read().decode(errors="replace").splitlines()
        except OSError as error:
            raise StoreError(
                f"The keys of {self._address.place} cannot be listed at {self._address.listing} ({shown(error)}); give the "
                "master's --metrics_port in the URL (?admin=9003)."
            ) from error
        start = self._name("")
        found = (name.removeprefix(start) for name in names if name.startswith(start))
        return iter([key for key in found if _KEY.fullmatch(key)])

    def size(self, key: str) -> int | None:
        with self._member.client() as client:
            code = int(client.get_size(self._name(key)))
        return None if code in MISSES else check(code, self._sentence("looked at", key))

    def check_writable(self) -> None:
        """Writes a small value and removes it.

        Raises:
            StoreError: the cluster cannot be reached or has no space.
        """
        name = self._name(f"probe-{secrets.token_hex(8)}")
        check(self._put(name, [b"probe"]), f"Nothing can be written to {self._address.place}")
        self._remove(name)

    def close(self) -> None:
        self._leave()

    def _name(self, key: str) -> str:
        return f"{self._address.prefix}/{key}"

    def _sentence(self, what: str, key: str) -> str:
        return f"Chunk {key} cannot be {what} in {self._address.place}"

    def _transfer(self, parts: Sequence[memoryview], transfer: Transfer, *, register: bool = False) -> int:
        """Runs a transfer into the parts; through a temporary buffer if there are too many parts."""
        pieces = [part for part in parts if part.nbytes]
        whole = bytearray(total_bytes(pieces)) if len(pieces) > MOST_PIECES else None
        addresses, sizes = _spots(pieces if whole is None else [memoryview(whole)])
        code = LEASE_EXPIRED
        for _ in range(ATTEMPTS):
            with self._member.client() as client, _registered(client, addresses, sizes, register or self._register):
                code = transfer(client, addresses, sizes)
            if code != LEASE_EXPIRED:
                break
        if whole is not None and code >= 0:
            _scatter(whole, pieces)
        return code

    def _put(self, name: str, parts: Sequence[Part]) -> int:
        pieces = [memoryview(part) for part in parts if memoryview(part).nbytes]
        if self._register or len(pieces) > MOST_PIECES:
            # Memory can be registered only once at a time, and other threads may be writing from the same memory.
            pieces = [memoryview(bytearray().join(pieces))]
        addresses, sizes = _spots(pieces)
        config = native_client().ReplicateConfig()
        config.replica_num = self._address.replicas
        with self._member.client() as client, _registered(client, addresses, sizes, self._register):
            return int(client.batch_put_from_multi_buffers([name], [addresses], [sizes], config)[0])

    def _remove(self, name: str) -> int:
        deadline = time.monotonic() + self._lease_seconds
        while True:
            with self._member.client() as client:
                code = int(client.remove(name))
            if code != LEASED or time.monotonic() > deadline:
                return code
            time.sleep(LOOK_AGAIN_SECONDS)


def _spots(pieces: Sequence[memoryview]) -> tuple[list[int], list[int]]:
    """Returns the pieces' memory addresses and sizes. The caller must keep the pieces as long as the addresses are used."""
    return [_address(piece) for piece in pieces], [piece.nbytes for piece in pieces]


def _address(piece: memoryview) -> int:
    if piece.readonly:
        return int(np.frombuffer(piece, np.uint8).__array_interface__["data"][0])
    return address_of(piece)  # ten times as fast; a read has hundreds of pieces


@contextmanager
def _registered(client: Any, addresses: Sequence[int], sizes: Sequence[int], wanted: bool) -> Iterator[None]:
    """Registers the memory with the client while the body runs, if `wanted`."""
    done: list[int] = []
    try:
        for address, size in zip(addresses, sizes, strict=True) if wanted else ():
            check(client.register_buffer(address, size), "Memory cannot be registered with the Mooncake client")
            done.append(address)
        yield
    finally:
        for address in done:
            client.unregister_buffer(address)


def _scatter(whole: bytearray, pieces: Sequence[memoryview]) -> None:
    """Copies the bytes into the pieces, in order. Uses numpy, which releases the GIL for the model's thread."""
    source, offset = np.frombuffer(whole, np.uint8), 0
    for piece in pieces:
        np.copyto(np.frombuffer(piece, np.uint8), source[offset : offset + piece.nbytes])
        offset += piece.nbytes
