"""A store in a Redis server (or a compatible one, such as Valkey), shared by a team's machines.

    <prefix>:3fa9...e1                  the manifest: length, size of a slice, and the tag of the slices; written last
    <prefix>:3fa9...e1:<tag>:<n>        slice n
    <prefix>:notes                      a hash of notes about the stored values

A value is stored if its manifest and all its slices are. The server decides which values are removed and when: by a time to
live from the URL, and by its own eviction (maxmemory-policy allkeys-lru fits best). It evicts slices one by one; a value that
has lost a slice is a miss, and any client with the permission removes the remains. Each write has slices of its own, which
expire after a while unless their manifest is written: a writer that dies leaves nothing behind.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import redis

from cake_hf.errors import CorruptChunk, StoreError
from cake_hf.stores.base import MAX_NOTE_BYTES, MOST_NOTES, Part, Store, refuse_longer, total_bytes
from cake_hf.stores.pieces import cut
from cake_hf.stores.redis_client import RedisAddress, advice, socket_of
from cake_hf.stores.redis_wire import MANIFEST_BYTES, Manifest, Refused, Unfit, Wire
from cake_hf.util.interrupts import faults_suppressed, is_the_users
from cake_hf.util.redaction import scrub

AHEAD = 2
"""Slices requested ahead of the one being received, so that the server neither idles nor buffers a whole value."""

STAGING_SECONDS = 900
"""Seconds that slices wait for their manifest, and that they outlive it."""

ATTEMPTS = 10
"""Attempts to read a value that is replaced during the read."""

UPLOADS = 2
"""Attempts to upload a value whose slices are evicted during the upload. The server picks at random among keys written within
one second; two failures in a row mean that its memory is too small."""

BATCH = 500
"""Keys per round trip."""


class RedisStore(Store):
    """A store in a Redis server.

    It is as durable as the server's configuration; in any case values outlive this process.

    Args:
        url: `redis://user:password@host:port/db`, `rediss://...` for TLS, `redis+unix:///path/to.sock?db=0` for a local socket.
            Options after the `?`: `ttl`, seconds that a value lives after it was written; `prefix` of the names (default
            "cake_hf"); and those of redis-py, such as `ssl_ca_certs`.
        slice_bytes: most bytes of one slice.
        timeout: seconds to wait for an answer, or for one slice of a value.

    Raises:
        StoreError: the URL or one of its options is invalid.
    """

    reads_ranges = True
    range_seconds = 1e-3  # two answers from a server nearby

    def __init__(self, url: str, *, slice_bytes: int = 4 * 2**20, timeout: float = 10.0) -> None:
        if slice_bytes <= 0 or timeout <= 0:
            raise ValueError("slice_bytes and timeout must be positive.")
        self._address = RedisAddress.parse(url)
        self._slice_bytes = slice_bytes
        self._timeout = timeout
        self._notes = f"{self._address.prefix}:notes"
        # Values use connections of their own, whose sockets are configured differently.
        self._lines = self._address.pool(timeout)
        self._client: Any = redis.Redis(connection_pool=self._address.pool(timeout))

    def __repr__(self) -> str:
        return f"RedisStore({self._address.place!r})"

    def identity(self) -> Hashable:
        return (type(self).__name__, self._address.place, self._address.prefix)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        with self._faults("Chunks cannot be looked up in"):
            return [found is not None for batch in _batches(keys) for found in self._complete(batch)]

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        expected = total_bytes(parts)

        def room(size: int) -> Sequence[memoryview]:
            if size != expected:
                raise CorruptChunk(f"Chunk {key} has {size} bytes, {expected} were expected.")
            return parts

        return self._read_whole(key, room)

    def read_up_to(self, key: str, buffer: memoryview) -> int | None:
        def room(size: int) -> Sequence[memoryview]:
            refuse_longer(key, size, buffer)
            return [buffer[:size]]

        return self._read_whole(key, room)

    def _read_whole(self, key: str, room: Callable[[int], Sequence[memoryview]]) -> int | None:
        """Reads a value into the room that is given for its size; returns the size, or None for a miss."""
        with self._faults(f"Chunk {key} cannot be read from"):
            lost: Manifest | None = None
            for _ in range(ATTEMPTS):
                manifest = self._manifest(key)
                if manifest is None or manifest == lost:  # the latter: we could not remove it
                    return None
                if self._fetch(key, manifest, room(manifest.size), 0):
                    return manifest.size
                self._discard(key, manifest)
                lost = manifest
        return None

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        end = offset + total_bytes(parts)
        with self._faults(f"Chunk {key} cannot be read from"):
            lost: Manifest | None = None
            for _ in range(ATTEMPTS):
                manifest = self._manifest(key)
                if manifest is None or manifest == lost:
                    return False
                if end > max(offset, manifest.size):
                    raise CorruptChunk(f"Chunk {key} ended early.")
                if self._fetch(key, manifest, parts, offset):
                    self._touch(key, manifest)
                    return True
                self._discard(key, manifest)
                lost = manifest
        return False

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        with self._faults(f"Chunk {key} cannot be written to"):
            if not replace and self._complete([key])[0] is not None:
                return False
            for _ in range(UPLOADS):
                manifest = Manifest(total_bytes(parts), self._slice_bytes, secrets.token_hex(8))
                published: bool | None = False
                try:
                    self._upload(key, manifest, parts)
                    published = self._publish(key, manifest, replace=replace)
                finally:
                    if not published:
                        self._drop_slices(key, manifest)
                if published is not None:
                    return published
        raise StoreError(
            f"Chunk {key} cannot be kept by {self._address.place}: parts of it were evicted while it was written; raise "
            "the server's maxmemory."
        )

    def delete(self, key: str) -> bool:
        with self._faults(f"Chunk {key} cannot be deleted from"):
            with self._client.pipeline(transaction=True) as commands:
                commands.getrange(self._name(key), 0, MANIFEST_BYTES)
                commands.delete(self._name(key))
                manifest = Manifest.parse(commands.execute()[0])
            if manifest is None:
                return False
            names = self._slices(key, manifest)
            return not names or self._client.unlink(*names) == len(names)

    def keys(self) -> Iterator[str]:
        pattern = self._name("?" * 40)
        seen: set[str] = set()  # A scan may name a key twice.
        with self._faults("Chunks cannot be listed in"):
            names = (name.decode(errors="replace") for name in self._client.scan_iter(pattern, count=1000))
            for batch in _batches(name[-40:] for name in names):
                found = [key for key in batch if re.fullmatch("[0-9a-f]{40}", key) and key not in seen]
                seen.update(found)
                yield from (key for key, manifest in zip(found, self._complete(found), strict=True) if manifest)

    def size(self, key: str) -> int | None:
        with self._faults(f"Chunk {key} cannot be looked up in"):
            manifest = self._manifest(key)
            if manifest is None:
                return None
            with self._client.pipeline(transaction=False) as commands:
                for name in self._slices(key, manifest):
                    commands.strlen(name)
                # Callers allocate memory by this size, so the manifest is compared with the actual slices.
                return manifest.size if commands.execute() == manifest.sizes else None

    def notes(self) -> Mapping[str, bytes]:
        with self._faults("Notes cannot be read from"):
            names = self._client.hkeys(self._notes)[:MOST_NOTES]
            with self._client.pipeline(transaction=False) as commands:
                for name in names:
                    commands.hstrlen(self._notes, name)
                small = [n for n, size in zip(names, commands.execute(), strict=True) if size <= MAX_NOTE_BYTES]
            found = zip(small, self._client.hmget(self._notes, small), strict=True) if small else ()
        return {name.decode(errors="replace"): note for name, note in found if note is not None}

    def put_note(self, name: str, note: bytes | None) -> None:
        with self._faults("A note cannot be kept in"):
            if note is None:
                self._client.hdel(self._notes, name)
                return
            self._client.hset(self._notes, name, note)
            if self._address.ttl is not None:
                self._client.expire(self._notes, self._address.ttl + STAGING_SECONDS)

    def check_writable(self) -> None:
        """Sets a small key.

        Raises:
            StoreError: the server cannot be reached, refuses, is full, or is only a replica.
        """
        with self._faults("Nothing can be written (to only read, pass save=False) to"):
            self._client.set(self._name("probe"), b"probe", ex=1)

    def close(self) -> None:
        self._client.connection_pool.disconnect()
        self._lines.disconnect()

    def _name(self, key: str) -> str:
        return f"{self._address.prefix}:{key}"

    def _slices(self, key: str, manifest: Manifest) -> list[str]:
        return [f"{self._name(key)}:{manifest.tag}:{n}" for n in range(len(manifest.sizes))]

    def _manifest(self, key: str) -> Manifest | None:
        return Manifest.parse(self._client.getrange(self._name(key), 0, MANIFEST_BYTES))

    def _complete(self, keys: Sequence[str]) -> list[Manifest | None]:
        """Returns for each key its manifest, or None unless all its slices are stored."""
        with self._client.pipeline(transaction=False) as commands:
            for key in keys:
                commands.getrange(self._name(key), 0, MANIFEST_BYTES)
            manifests = [Manifest.parse(raw) for raw in commands.execute()]
            counted = [
                (place, manifest, names)
                for place, (key, manifest) in enumerate(zip(keys, manifests, strict=True))
                if manifest is not None and (names := self._slices(key, manifest))
            ]
            for _, _, names in counted:
                commands.exists(*names)  # unlike a read, this does not count as a use
            for (place, manifest, names), count in zip(counted, commands.execute(), strict=True):
                if count != len(names):
                    self._discard(keys[place], manifest)
                    manifests[place] = None
        return manifests

    def _fetch(self, key: str, manifest: Manifest, parts: Sequence[memoryview], offset: int) -> bool:
        """Fills the parts from an offset in the value on; returns False if a slice is missing.

        Raises:
            CorruptChunk: a slice's length differs from the manifest.
        """
        asked = list(manifest.ranges(offset, total_bytes(parts)))
        pieces = cut(parts, [end - begin for _, begin, end in asked])
        names = self._slices(key, manifest)
        with self._wire() as wire:
            ahead = iter(asked)
            for number, begin, end in islice(ahead, 1 + AHEAD):
                wire.ask(*_get(names[number], begin, end, manifest.sizes[number]))
            for piece in pieces:
                try:
                    if not wire.receive(piece):
                        return False
                except Unfit:
                    raise CorruptChunk(f"A slice of chunk {key} has another length than it should.") from None
                for number, begin, end in islice(ahead, 1):
                    wire.ask(*_get(names[number], begin, end, manifest.sizes[number]))
        return True

    def _touch(self, key: str, manifest: Manifest) -> None:
        """Marks all slices as used, like the one that was read, so that they are evicted together. Faults are ignored."""
        with faults_suppressed(redis.RedisError, OSError):
            if names := self._slices(key, manifest):
                self._client.touch(*names)

    def _upload(self, key: str, manifest: Manifest, parts: Sequence[Part]) -> None:
        with self._wire() as wire:
            for name, piece in zip(self._slices(key, manifest), cut(parts, manifest.sizes), strict=True):
                wire.store([b"SET", name.encode()], piece, [b"EX", b"%d" % STAGING_SECONDS])

    def _publish(self, key: str, manifest: Manifest, *, replace: bool) -> bool | None:
        """Turns the uploaded slices into a value, by writing its manifest.

        Returns:
            False if there is a value already that is to stay (nothing is changed then); None if a slice has been evicted
            meanwhile.
        """
        names, name, ttl = self._slices(key, manifest), self._name(key), self._address.ttl
        with self._client.pipeline(transaction=True) as commands:
            commands.getrange(name, 0, MANIFEST_BYTES)
            commands.set(name, manifest.encode(), nx=not replace, ex=ttl)
            for slice_name in names:
                # Slices must not expire before their manifest, so that a listed value is complete.
                commands.persist(slice_name) if ttl is None else commands.expire(slice_name, ttl + STAGING_SECONDS)
            if names:
                commands.exists(*names)
            raw, done, *rest = commands.execute()
        before = Manifest.parse(raw)
        if not done and before != manifest:  # It may be ours: the client retries after a lost answer.
            # Either a foreign key under our name, or a value that has lost a slice and that we may not delete.
            is_none = before is None or not self._is_whole(key, before)
            return self._publish(key, manifest, replace=True) if is_none else False
        if names and rest[-1] != len(names):
            self._discard(key, manifest)
            return None
        if before is not None and before != manifest:
            self._drop_slices(key, before)
        return True

    def _is_whole(self, key: str, manifest: Manifest) -> bool:
        names = self._slices(key, manifest)
        return not names or self._client.exists(*names) == len(names)

    def _discard(self, key: str, manifest: Manifest) -> None:
        """Removes a value that has lost a slice, unless it has been replaced meanwhile, if the server permits it.

        A replica, or a user with read permission only, does not permit it: then the value stays a miss, checked anew each time.
        """
        if not self._drop_slices(key, manifest):
            return
        name = self._name(key)
        with faults_suppressed(redis.RedisError, OSError), self._client.pipeline(transaction=True) as commands:
            commands.watch(name)
            if Manifest.parse(commands.getrange(name, 0, MANIFEST_BYTES)) == manifest:
                commands.multi()
                commands.delete(name)
                commands.execute()

    def _drop_slices(self, key: str, manifest: Manifest) -> bool:
        """Removes slices that belong to no value; returns False if that fails. They expire or are evicted then."""
        names = self._slices(key, manifest)
        try:
            if names:
                self._client.unlink(*names)
        except (redis.RedisError, OSError) as error:
            if is_the_users(error):
                raise
            return False
        return True

    @contextmanager
    def _wire(self) -> Iterator[Wire]:
        """Borrows a connection for values from redis-py, which has connected and logged in."""
        connection: Any = self._lines.get_connection()
        try:
            wire = Wire(socket_of(connection), self._timeout)
            yield wire
            if wire.under_way:
                connection.disconnect()
        except BaseException:
            connection.disconnect()
            raise
        finally:
            self._lines.release(connection)

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """Turns faults of the server into StoreErrors that say what to do."""
        try:
            yield
        except (redis.RedisError, OSError, Refused) as error:
            if is_the_users(error):
                raise
            said = advice(error, self._address.secrets)
            scrub(error, self._address.secrets)
            raise StoreError(f"{what} {self._address.place}: {said}") from error


def _get(name: str, begin: int, end: int, size: int) -> list[bytes]:
    """Returns the command for a part of a slice. A whole slice is requested without a range, to detect a wrong length."""
    if (begin, end) == (0, size):
        return [b"GET", name.encode()]
    return [b"GETRANGE", name.encode(), b"%d" % begin, b"%d" % (end - 1)]


def _batches(items: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch
