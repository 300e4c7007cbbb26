"""A store in object storage (`s3://`, `gs://`, `az://`), through obstore.

    <prefix>/3f/3fa9...e1.safetensors      a chunk; the service shows an object only once its upload is complete

The names are the same as in a directory store, so the service's own tools can copy one to the other.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from obstore.exceptions import AlreadyExistsError, BaseError

from cake_hf.errors import CorruptChunk, StoreError, is_a_fault
from cake_hf.stores.base import MAX_NOTE_BYTES, MOST_NOTES, Part, Store, total_bytes
from cake_hf.stores.object_client import Spread, advice, bucket_is_missing, connect, refuse_more_than_a_place
from cake_hf.stores.pieces import cut, even_sizes
from cake_hf.util.interrupts import faults_suppressed
from cake_hf.util.redaction import is_secret, scrub

RANGE_BYTES = 8 * 2**20
"""Most bytes of one read request. One connection rarely uses the full bandwidth, so larger values are read over several, unless
`Spread` finds that fewer requests are faster."""

STEP_BYTES = 2**18
"""Bytes of an answer that are copied at once: about the size of the client's own buffers, so that it need not join them."""

REQUESTS = 32
"""Most requests under way at once, per store."""

PATIENCE_FOR_UPLOADS = 4
"""Factor by which the upload of a whole value may take longer than any other request."""

ATTEMPTS = 5
"""Attempts to read a value that is replaced while its ranges are read."""

FAULTS = (BaseError, OSError, ValueError, RuntimeError, CancelledError)
"""Errors of the client; the last two come from the threads of a store that was closed."""

SUFFIX = ".safetensors"
_NAME = re.compile(rf"([0-9a-f]{{2}})/(\1[0-9a-f]{{38}}){re.escape(SUFFIX)}")

NOTES = "notes"
_NOTE = re.compile(rf"{NOTES}/namespace-([0-9a-f]{{40}})\.json")

T = TypeVar("T")


class ObjectStore(Store):
    """A store in a bucket. Opening it sends no request; the first call does.

    Args:
        url: `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.
        options: options of the client, by its names, such as `endpoint`, `region` or `access_key_id`; they take precedence
            over the environment.
        timeout: seconds that one request may take. Retries end after half that time, counted from the start of the call;
            uploads may take four times as long.
        range_bytes: most bytes of one read request; a larger value is read over several connections.
        clock: gives the seconds by which it learns how many requests are fastest.

    Raises:
        StoreError: the URL or an option is invalid, or no S3 credentials are found.
    """

    reads_ranges = True
    range_seconds = 0.03  # one more request

    def __init__(
        self,
        url: str,
        *,
        options: Mapping[str, Any] | None = None,
        timeout: float = 30.0,
        range_bytes: int = RANGE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheme = url.partition(":")[0]
        refuse_more_than_a_place(url)
        self.url = url.rstrip("/")
        self._secrets = tuple(str(value) for name, value in (options or {}).items() if is_secret(name))
        with self._faults("The store cannot be opened at"):
            # An upload is one request for a whole value, so it has a client of its own with more time.
            timeouts = (timeout, timeout * PATIENCE_FOR_UPLOADS)
            self._reading, self._writing = connect(url, options or {}, timeouts)
        self._range_bytes, self._clock = range_bytes, clock
        self._spread = Spread()
        self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="cake-object")

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def identity(self) -> Hashable:
        return (type(self).__name__, self.url)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        # One request per key, many at once. A listing would return the whole store, most of it irrelevant here.
        unique = list(dict.fromkeys(keys))
        with self._faults("Chunks cannot be looked up in"):
            found = {
                key for key, size in zip(unique, self._pool.map(self.size, unique), strict=True) if size is not None
            }
        return [key in found for key in keys]

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        expected = total_bytes(parts)
        size = self._load(key, parts, 0)
        if size is not None and size != expected:
            raise CorruptChunk(f"Chunk {key} has {size} bytes, {expected} were expected.")
        return size

    def read_range(self, key: str, parts: Sequence[memoryview], offset: int) -> bool:
        return self._load(key, parts, offset) is not None

    def write(self, key: str, parts: Sequence[Part], *, replace: bool = False) -> bool:
        # The service would refuse the second upload of a key, but only after it was sent.
        if not replace and self.size(key) is not None:
            return False
        with self._faults(f"Chunk {key} cannot be written to"):
            try:
                self._put(_path(key), parts, "overwrite" if replace else "create")
            except AlreadyExistsError:
                return False
            except NotImplementedError:  # no conditional writes here: the last writer wins, with the same bytes
                self._put(_path(key), parts, "overwrite")
        return True

    def delete(self, key: str) -> bool:
        if self.size(key) is None:  # Some services do not say whether an object was deleted.
            return False
        with self._faults(f"Chunk {key} cannot be deleted from"):
            try:
                self._reading.delete(_path(key))
            except FileNotFoundError:
                return False
        return True

    def keys(self) -> Iterator[str]:
        with self._faults("Chunks cannot be listed in"):
            for page in self._reading.list(chunk_size=1000):
                for entry in page:
                    if name := _NAME.fullmatch(entry["path"]):
                        yield name[2]

    def size(self, key: str) -> int | None:
        with self._faults(f"Chunk {key} cannot be looked up in"):
            try:
                return int(self._reading.head(_path(key))["size"])
            except FileNotFoundError:
                return None

    def notes(self) -> Mapping[str, bytes]:
        with self._faults("Notes cannot be read from"):
            found = [entry for page in self._reading.list(NOTES, chunk_size=1000) for entry in page]
            newest = sorted(filter(_is_note, found), key=lambda entry: entry["last_modified"], reverse=True)
            paths = [entry["path"] for entry in newest[:MOST_NOTES]]
            read = zip(paths, self._pool.map(self._note, paths), strict=True)
            return {_NOTE.sub(r"\1", path): note for path, note in read if note is not None}

    def put_note(self, name: str, note: bytes | None) -> None:
        path = f"{NOTES}/namespace-{name}.json"
        with self._faults("A note cannot be kept in"), faults_suppressed(FileNotFoundError):
            if note is None:
                self._reading.delete(path)
            else:
                self._put(path, [note], "overwrite")

    def check_writable(self) -> None:
        """Uploads a small object and removes it.

        Raises:
            StoreError: there is no such bucket, no permission, no space or no connection.
        """
        with self._faults("Nothing can be written (to only read, pass save=False) to"):
            self._put("probe", [b"probe"], "overwrite")
            with faults_suppressed(Exception):  # Write permission need not include deletion.
                self._reading.delete("probe")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _note(self, path: str) -> bytes | None:
        """Returns a note's bytes; None if it has vanished meanwhile."""
        try:
            return bytes(self._reading.get(path).bytes())
        except FileNotFoundError:
            return None

    def _put(self, path: str, parts: Sequence[Part], mode: str) -> None:
        # In one piece: a multipart upload cannot be write-once, and an interrupted one takes up storage until it is swept.
        views = (memoryview(part).cast("B") for part in parts)
        self._writing.put(path, views, mode=mode, use_multipart=False)

    def _load(self, key: str, parts: Sequence[memoryview], offset: int) -> int | None:
        """Fills the parts from an offset in the object on; returns the object's size, or None for a miss."""
        total = total_bytes(parts)
        most = len(even_sizes(total, self._range_bytes))
        halvings = self._spread.halvings(most) if most > 1 else 0
        sizes = even_sizes(total, self._range_bytes << halvings)
        if not sizes:  # An empty range cannot be requested.
            return self.size(key)
        starts = accumulate(sizes[:-1], initial=offset)
        calls = [partial(self._fetch, key, *piece) for piece in zip(starts, cut(parts, sizes), strict=True)]
        with self._faults(f"Chunk {key} cannot be read from"):
            for _ in range(ATTEMPTS):
                begin = self._clock()
                try:
                    versions = self._together(calls)
                except FileNotFoundError as error:
                    if bucket_is_missing(error):
                        raise
                    return None
                if len(set(versions)) == 1:
                    if most > 1:
                        self._spread.learn(halvings, total, self._clock() - begin)
                    return versions[0][0]
        raise StoreError(f"Chunk {key} in {self.url} was replaced {ATTEMPTS} times while it was read; try again.")

    def _fetch(self, key: str, start: int, parts: Sequence[memoryview]) -> tuple[int, str]:
        """Reads one range into the parts; returns the version of the object: its size and its tag."""
        end = start + total_bytes(parts)
        try:
            answer = self._reading.get(_path(key), options={"range": (start, end)})
            version = answer.meta["size"], answer.meta["e_tag"] or str(answer.meta["last_modified"])
            left = deque(np.frombuffer(part, np.uint8) for part in parts if part.nbytes)
            # Copied as it arrives, while it is in the processor's cache; the whole answer is never held in memory.
            for content in answer.stream(min_chunk_size=STEP_BYTES):
                _pour(np.frombuffer(content, np.uint8), left)
        except BaseError as error:
            if "416 Range Not Satisfiable" in str(error):
                raise CorruptChunk(f"Chunk {key} ended early.") from error
            raise
        if left:
            raise CorruptChunk(f"Chunk {key} ended early.")
        return version

    def _together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Runs the calls at once, the first one in this thread.

        No call is still running when this returns or raises, since they write to the caller's buffers.
        """
        others: list[Future[T]] = []
        try:
            others.extend(map(self._pool.submit, calls[1:]))
            return [calls[0](), *(other.result() for other in others)]
        finally:
            wait([other for other in others if not other.cancel()])

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """Turns the client's errors into StoreErrors that say what to do."""
        try:
            yield
        except BaseException as error:
            # A panic inside the client is raised as a BaseException of a type that cannot be imported.
            is_panic = type(error).__name__ == "PanicException"
            if is_panic or (isinstance(error, FAULTS) and is_a_fault(error)):
                said = advice(error, self._scheme, self._secrets)
                scrub(error, self._secrets)
                raise StoreError(f"{what} {self.url}: {said}") from error
            raise


def _pour(source: np.ndarray[Any, Any], left: deque[np.ndarray[Any, Any]]) -> None:
    """Copies bytes to the unfilled parts `left`. Uses numpy, which releases the GIL; slice assignment does not."""
    while len(source) and left:
        count = min(len(source), len(left[0]))
        np.copyto(left[0][:count], source[:count])
        source = source[count:]
        if count == len(left[0]):
            left.popleft()
        else:
            left[0] = left[0][count:]


def _is_note(entry: Mapping[str, Any]) -> bool:
    return _NOTE.fullmatch(entry["path"]) is not None and entry["size"] <= MAX_NOTE_BYTES


def _path(key: str) -> str:
    return f"{key[:2]}/{key}{SUFFIX}"
