"""Chunks in a Mooncake cluster (`mooncake://`): the memory that many machines lend, behind one master.

    <prefix>/3fa9...e1      a chunk; the master shows it when all of it has arrived, or not at all

A reader gets a lease on what it reads or asks for (10 seconds by default), in which nothing of it is removed.
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
"""Pieces of one transfer. The client gives each a place in a queue of 2,048 and fails where that is full."""

LEASE_SECONDS = 15.0
"""How long a removal waits for leases to run out: longer than the master's default."""

LOOK_AGAIN_SECONDS = 0.02
"""How often it looks whether they have."""

ATTEMPTS = 3
"""How often a value is read whose lease runs out meanwhile."""

LISTING_SECONDS = 30.0
"""How long the master may take to list its keys."""

MISSES = (NOT_FOUND, NOT_READY)
_KEY = re.compile(r"[0-9a-f]{40}")

Transfer = Callable[[Any, list[int], list[int]], int]
"""Called with the client, addresses and sizes; gives the client's answer: bytes, or what went wrong."""


class MooncakeStore(Store):
    """A store in a Mooncake cluster. Opening it asks nothing of the cluster; the first call joins it.

    What it does not promise, since Mooncake does not:

    * *Durability.* A value lives in the memory of a process that lends it, or of `replicas` such processes, and goes with the
      last of them (until the master has noticed that one is gone, 10 seconds by default, reads and writes that are sent there
      fail); a master that ends forgets all. When the memory is full, the master evicts what was used least. Lend memory from
      processes that live on (`mooncake_client`, or a store with `lend` that stays open), and put a directory or a bucket
      beside it (see `TierStore`) for what has to last.
    * *Deletion at once.* `delete`, and `write` with `replace`, wait until nobody has a lease on the value any more,
      `lease_seconds` at most; then they are a `StoreError`. (Mooncake's own replacement changes values under their readers, so
      it is not used.)
    * *Who wins.* Of two that write one key at the same time both may be told that they wrote it.
    * *Empty values* are refused.

    The client listens on all network interfaces, and so does the master: only for networks in which you trust everybody.

    Args:
        url: `mooncake://master:50051/prefix`; the prefix (default "cake_hf") keeps the keys apart from others in the cluster.
            Options after the `?`: `lend` (memory that this process lends, such as 4GB; default none), `replicas` (default 1),
            `protocol` ("tcp"; or "rdma", with `devices`), `metadata` (default "P2PHANDSHAKE"), `host` (under which others reach
            this machine; by default the address it reaches the master from), `admin` (the master's metrics port, through
            which keys are listed; default 9003).
        lease_seconds: how long removals wait for readers; longer than the master's --default_kv_lease_ttl.
        register: tell the client of each piece of memory before it is used, as RDMA wants it; by default where it is not TCP.

    Raises:
        StoreError: the URL or an option makes no sense, or the client is not installed.
    """

    reads_ranges = True
    range_seconds = 1e-3  # two answers from machines nearby

    def __init__(self, url: str, *, lease_seconds: float = LEASE_SECONDS, register: bool | None = None) -> None:
        address = MooncakeAddress.parse(url)
        native_client()  # without it nothing could ever be done
        self._address = address
        self._lease_seconds = lease_seconds
        self._register = address.settings.protocol != "tcp" if register is None else register
        self._member = join(address.settings)
        self._leave = weakref.finalize(self, leave, self._member)
        self._leave.atexit = False  # the client's own file sees to that, for all stores at once

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
        if count < 0 and count not in MISSES:  # What does not fit fails in one way or another.
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
        """As the contract says, but for what the class does not promise.

        Raises:
            StoreError: the value is empty or cannot be written, or the old one is being read all the time.
        """
        if not total_bytes(parts):
            raise StoreError("Mooncake keeps no empty values.")
        if replace:
            self.delete(key)
        elif self.contains([key])[0]:
            return False
        check(self._put(self._name(key), parts), self._sentence("written", key))
        # To whoever comes second the client says that all is well, even if the first one never gets done.
        return self.contains([key])[0]

    def delete(self, key: str) -> bool:
        """Remove a key when nobody has a lease on it any more.

        Raises:
            StoreError: it cannot be removed, or is read all the time.
        """
        code = self._remove(self._name(key))
        if code not in MISSES:
            check(code, self._sentence("deleted", key))
        return code not in MISSES

    def keys(self) -> Iterator[str]:
        """All keys under the prefix, from the master's metrics port.

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
        """Write a small value and remove it.

        Raises:
            StoreError: the cluster cannot be reached or has no room.
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
        """Run a transfer into the parts; by way of memory of its own where they are too many."""
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
            # Memory can be registered only once at a time, and other threads may be writing the same.
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
    """Where the pieces are in memory, and their sizes. The pieces must be kept as long as these are used."""
    return [_address(piece) for piece in pieces], [piece.nbytes for piece in pieces]


def _address(piece: memoryview) -> int:
    if piece.readonly:
        return int(np.frombuffer(piece, np.uint8).__array_interface__["data"][0])
    return address_of(piece)  # ten times as fast; a read has hundreds of pieces


@contextmanager
def _registered(client: Any, addresses: Sequence[int], sizes: Sequence[int], wanted: bool) -> Iterator[None]:
    """Tell the client of this memory while the body runs, where that is wanted."""
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
    """Copy the bytes into the pieces, in order. By numpy, which lets the model's thread go on meanwhile."""
    source, offset = np.frombuffer(whole, np.uint8), 0
    for piece in pieces:
        np.copyto(np.frombuffer(piece, np.uint8), source[offset : offset + piece.nbytes])
        offset += piece.nbytes
