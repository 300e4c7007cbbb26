"""The files of a store in a directory: where they are, how one appears, and what dead writers leave.

    <root>/cake-hf-store                 says that this is a store
    <root>/3f/3fa9...e1.safetensors      a chunk; it gets its name when it is whole
    <root>/partial/3fa9...e1.<random>    a chunk being written; its writer holds a lock on it while it lives
    <root>/bytes                         how many bytes all of these have, once a process keeps a budget; may be deleted
    <root>/pins                          until when which chunks stay, see `pins`; may be deleted
    <root>/notes/...                     what was learnt about this store's speed, and what its chunks were made with; may be
                                         deleted at any time

A partial file whose lock is free belongs to a dead writer, and is swept away by who writes to the store. No link is followed,
and what is no regular file of such a name is left alone, see `below`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cake_hf.errors import StoreError
from cake_hf.stores.eviction import Entry, date_of_use
from cake_hf.stores.marker import BYTES, LEFTOVER, NOTES, PARTIAL, SHARD, SUFFIX, claim, is_store, key_in
from cake_hf.stores.partial import Partial, being_written, link, new_file, remove_if_left
from cake_hf.stores.safe_paths import (
    FoundFile,
    advice,
    directory,
    entries_of,
    files_of,
    make_directory,
    open_file,
    reach,
    status_of,
    sync_directory,
    what_is,
)

__all__ = ["BYTES", "NOTES", "PARTIAL", "SUFFIX", "Folder"]


@dataclass(frozen=True)
class ShardListing:
    """The chunks in one folder.

    Attributes:
        changed: when names in the folder last changed, in nanoseconds as the filesystem counts them.
        entries: of the chunks.
    """

    changed: int
    entries: list[Entry]


class Folder:
    """The files below one root. Methods raise OSError as it comes; who calls them knows what was being done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._path = str(root)

    def path(self, key: str) -> str:
        """The file of a chunk, for people; who opens it so follows links."""
        return f"{self.root}/{key[:2]}/{key}{SUFFIX}"

    def is_store(self) -> bool:
        """Whether there is a store."""
        try:
            with directory(self.root) as root:
                return is_store(root)
        except FileNotFoundError:
            return False

    # Looking.

    def statuses(self, keys: Sequence[str]) -> list[os.stat_result | None]:
        """For each key the status of its file; None where there is none."""
        found: list[os.stat_result | None] = [None] * len(keys)
        places: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            places.setdefault(key[:2], []).append(number)
        with suppress(FileNotFoundError), directory(self._path) as root:
            for shard, numbers in places.items():
                try:
                    folder = reach(shard, root)
                except FileNotFoundError:
                    continue
                try:
                    for number in numbers:
                        found[number] = status_of(f"{keys[number]}{SUFFIX}", folder)
                finally:
                    os.close(folder)
        return found

    @contextmanager
    def chunk(self, key: str) -> Iterator[tuple[int, os.stat_result]]:
        """A chunk's file, open for reading, and its status.

        Raises:
            FileNotFoundError: there is none.
        """
        root = reach(self._path)
        try:
            folder = reach(key[:2], root)
        finally:
            os.close(root)
        try:
            descriptor, status = open_file(f"{key}{SUFFIX}", os.O_RDONLY, folder)
        finally:
            os.close(folder)
        try:
            yield descriptor, status
        finally:
            os.close(descriptor)

    def keys(self) -> Iterator[str]:
        """All chunks that have their name.

        Raises:
            StoreError: a directory cannot be listed.
        """
        for shard in self.shards():
            found: list[FoundFile] = []
            with (
                suppress(FileNotFoundError),
                self._listed(shard),
                directory(self.root) as root,
                directory(shard, root) as folder,
            ):
                found = entries_of(folder)
            yield from (key for name, is_file, _ in found if is_file and (key := key_in(shard, name)))

    def shards(self) -> list[str]:
        """The folders that chunks may be in.

        Raises:
            StoreError: the directory cannot be listed.
        """
        with suppress(FileNotFoundError), self._listed(""), directory(self.root) as root:
            return sorted(name for name, _, is_folder in entries_of(root) if is_folder and SHARD.fullmatch(name))
        return []

    def shard_listing(self, shard: str) -> ShardListing:
        """The chunks in a folder, with their sizes and last uses, as far as they are still there.

        Raises:
            StoreError: it cannot be listed.
        """
        now = time.time()
        with (
            suppress(FileNotFoundError),
            self._listed(shard),
            directory(self.root) as root,
            directory(shard, root) as folder,
        ):
            changed = os.fstat(folder).st_mtime_ns
            found = list(files_of(folder, lambda name: key_in(shard, name)))
            entries = [_entry(name.removesuffix(SUFFIX), status, now) for name, status in found]
            return ShardListing(changed, entries)
        return ShardListing(0, [])

    def shard_changed(self, shard: str) -> int:
        """When names in a folder last changed; 0 where there is none."""
        with suppress(FileNotFoundError), directory(self.root) as root, directory(shard, root) as folder:
            return os.fstat(folder).st_mtime_ns
        return 0

    def entries(self) -> Iterator[Entry]:
        """All chunks with their sizes and last uses, as far as they are still there.

        Raises:
            StoreError: a directory cannot be listed.
        """
        for shard in self.shards():
            yield from self.shard_listing(shard).entries

    def partial_bytes(self) -> int:
        """Bytes of all files that are being written, each as large as it will be."""
        with (
            suppress(FileNotFoundError),
            self._listed(PARTIAL),
            directory(self.root) as root,
            directory(PARTIAL, root) as folder,
        ):
            # With a second name it is a chunk already.
            return sum(status.st_size for _, status in files_of(folder, LEFTOVER.fullmatch) if status.st_nlink < 2)
        return 0

    # Removing.

    def remove(self, key: str) -> int | None:
        """Delete a chunk; its bytes, which are free now, or None where there is none.

        Readers hold the file open and read on; whoever comes later finds a miss.
        """
        return self._remove(key, lambda status: True)

    def discard(self, entry: Entry) -> int:
        """Delete a chunk, unless it was used since it was listed; gives the bytes that are free now."""
        now = time.time()
        return self._remove(entry.key, lambda status: date_of_use(status.st_mtime, now) <= entry.used) or 0

    def sweep(self) -> int:
        """Remove what killed writers left behind; returns how many files. Files of living writers stay."""
        swept = 0
        # Somebody else's store may not let us: it can be read all the same.
        with suppress(OSError), directory(self.root) as root, directory(PARTIAL, root) as folder:
            for name, _ in files_of(folder, LEFTOVER.fullmatch):
                if name in being_written:
                    continue
                with suppress(OSError):
                    swept += remove_if_left(name, folder)
        return swept

    # Writing.

    @contextmanager
    def partial_file(self, key: str) -> Iterator[Partial]:
        """A new file under `partial/`, open for writing, locked as long as its writer lives, and gone from there afterwards.

        Raises:
            StoreError: the directory is no store, and not empty.
        """
        with ExitStack() as stack:
            root = stack.enter_context(self._claimed_root())
            make_directory(PARTIAL, root)
            folder = stack.enter_context(self._folder_to_write(PARTIAL, root))
            partial = new_file(key, folder, root)
            being_written.add(partial.name)
            try:
                yield partial
            finally:
                being_written.discard(partial.name)
                with suppress(OSError):  # its bytes have been synced
                    partial.close()
                with suppress(OSError):
                    os.unlink(partial.name, dir_fd=folder)

    def give_name(self, partial: Partial, key: str, *, replace: bool) -> bool:
        """Let a whole partial file be the chunk; False, and nothing is changed, where there is one and it is to stay.

        A link fails where the name is taken, so of two writers of one key only the first one succeeds. Where the filesystem has
        no links, both may, one after the other; their values are equal. Not all of them rename a file that is open, and some
        tell only when it is closed that its bytes did not arrive.

        The partial name is gone then: as long as a chunk has both, evicting it frees nothing.
        """
        name = f"{key}{SUFFIX}"
        if make_directory(key[:2], partial.root):
            sync_directory(partial.root)
        with self._folder_to_write(key[:2], partial.root) as shard:
            if not replace and link(partial, name, shard):
                return True
            if (taken := what_is(name, shard)) is not None:
                if not stat.S_ISREG(taken.st_mode):
                    raise StoreError(f"{self.path(key)} is no plain file, so no chunk can have this name; remove it.")
                if not replace:
                    return False
            partial.close()
            os.rename(partial.name, name, src_dir_fd=partial.folder, dst_dir_fd=shard)
            return True

    def make_name_durable(self, key: str) -> None:
        """Bring the chunk's name to the disk. Where that fails it is taken back: what is listed has to survive a crash."""
        try:
            # A chunk that was evicted meanwhile has no name to be kept, its folder may be gone with it.
            with suppress(FileNotFoundError), directory(self.root) as root, directory(key[:2], root) as shard:
                sync_directory(shard)
        except OSError:
            with suppress(OSError):
                self.remove(key)
            raise

    @contextmanager
    def _claimed_root(self) -> Iterator[int]:
        """The store's directory, made where it is missing."""
        with ExitStack() as stack:
            try:
                root = stack.enter_context(directory(self.root))
            except FileNotFoundError:
                self._make_root()
                root = stack.enter_context(directory(self.root))
            claim(root, self.root)
            yield root

    def _make_root(self) -> None:
        try:
            # KV gives away its prompt. Who wants to share a directory makes it, with the mode they want.
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"The store directory {self.root} cannot be made: {advice(error)}") from error

    @contextmanager
    def _folder_to_write(self, name: str, root: int) -> Iterator[int]:
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(directory(name, root))
            except FileNotFoundError as error:
                if what_is(name, root) is not None:
                    raise StoreError(
                        f"{self.root / name} is a link or a file, where a store needs a folder of its own; remove it."
                    ) from error
                raise
            yield folder

    def _remove(self, key: str, may_go: Callable[[os.stat_result], bool]) -> int | None:
        with suppress(FileNotFoundError), directory(self.root) as root, directory(key[:2], root) as shard:
            status = status_of(f"{key}{SUFFIX}", shard)
            if status is not None and may_go(status):
                os.unlink(f"{key}{SUFFIX}", dir_fd=shard)
                return status.st_size
        return None

    @contextmanager
    def _listed(self, name: str) -> Iterator[None]:
        """A folder that cannot be looked at is not one that is not there."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"The directory {self.root / name} cannot be listed: {advice(error)}") from error


def _entry(key: str, status: os.stat_result, now: float) -> Entry:
    return Entry(key, status.st_size, date_of_use(status.st_mtime, now))
