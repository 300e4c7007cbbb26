"""The files of a directory store: where they are, how a chunk appears, and how files of dead writers are removed.

    <root>/cake-hf-store                 marks the directory as a store
    <root>/3f/3fa9...e1.safetensors      a chunk; it gets this name once it is complete
    <root>/partial/3fa9...e1.<random>    a chunk being written; its writer locks it as long as it lives
    <root>/bytes                         the byte count of all of these, once a process keeps a budget; may be deleted
    <root>/pins                          which chunks are pinned until when, see `pins`; may be deleted
    <root>/notes/...                     measurements of this store's speed, and what its chunks were made with; may be
                                         deleted at any time

A partial file whose lock is free belongs to a dead writer; the next process that writes to the store sweeps it away. No link is
followed, and anything of such a name that is not a regular file is left alone, see `safe_paths`.
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
        changed: when names in the folder last changed, in nanoseconds by the filesystem's clock.
        entries: the chunks with their sizes and times of last use.
    """

    changed: int
    entries: list[Entry]


class Folder:
    """The files below one root. Methods pass OSError through; their callers know what was being done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._path = str(root)

    def path(self, key: str) -> str:
        """Returns the path of a chunk's file, for messages; opening it by this path would follow links."""
        return f"{self.root}/{key[:2]}/{key}{SUFFIX}"

    def is_store(self) -> bool:
        """Returns whether the root exists and is a store."""
        try:
            with directory(self.root) as root:
                return is_store(root)
        except FileNotFoundError:
            return False

    # Reading.

    def statuses(self, keys: Sequence[str]) -> list[os.stat_result | None]:
        """Returns for each key the status of its file, or None if there is no such file."""
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
        """Opens a chunk's file for reading; yields its descriptor and status.

        Raises:
            FileNotFoundError: there is no such chunk.
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
        """Iterates over the keys of all complete chunks.

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
        """Returns the folders that chunks may be in.

        Raises:
            StoreError: the directory cannot be listed.
        """
        with suppress(FileNotFoundError), self._listed(""), directory(self.root) as root:
            return sorted(name for name, _, is_folder in entries_of(root) if is_folder and SHARD.fullmatch(name))
        return []

    def shard_listing(self, shard: str) -> ShardListing:
        """Lists the chunks in a folder, with their sizes and times of last use; chunks that vanish meanwhile are left out.

        Raises:
            StoreError: the folder cannot be listed.
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
        """Returns when names in a folder last changed; 0 if there is no such folder."""
        with suppress(FileNotFoundError), directory(self.root) as root, directory(shard, root) as folder:
            return os.fstat(folder).st_mtime_ns
        return 0

    def entries(self) -> Iterator[Entry]:
        """Iterates over all chunks, with their sizes and times of last use; chunks that vanish meanwhile are left out.

        Raises:
            StoreError: a directory cannot be listed.
        """
        for shard in self.shards():
            yield from self.shard_listing(shard).entries

    def partial_bytes(self) -> int:
        """Returns the bytes of all files being written, each at its final size."""
        with (
            suppress(FileNotFoundError),
            self._listed(PARTIAL),
            directory(self.root) as root,
            directory(PARTIAL, root) as folder,
        ):
            # A file with a second name is a chunk already.
            return sum(status.st_size for _, status in files_of(folder, LEFTOVER.fullmatch) if status.st_nlink < 2)
        return 0

    # Removing.

    def remove(self, key: str) -> int | None:
        """Deletes a chunk; returns the bytes freed, or None if there was no such chunk.

        Readers that hold the file open read on; later readers get a miss.
        """
        return self._remove(key, lambda status: True)

    def discard(self, entry: Entry) -> int:
        """Deletes a chunk, unless it was used since it was listed; returns the bytes freed."""
        now = time.time()
        return self._remove(entry.key, lambda status: date_of_use(status.st_mtime, now) <= entry.used) or 0

    def sweep(self) -> int:
        """Removes files that killed writers left behind; returns how many. Files of living writers stay."""
        swept = 0
        # Another user's store may not permit this; it can still be read.
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
        """Creates a file under `partial/`, open for writing and locked as long as its writer lives; removes it afterwards.

        Raises:
            StoreError: the directory is neither a store nor empty.
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
                with suppress(OSError):  # the file's bytes are already synced
                    partial.close()
                with suppress(OSError):
                    os.unlink(partial.name, dir_fd=folder)

    def give_name(self, partial: Partial, key: str, *, replace: bool) -> bool:
        """Gives a complete partial file the chunk's name; returns False and changes nothing if a chunk is there and stays.

        A link fails if the name is taken, so of two writers of one key only the first succeeds. On a filesystem without links
        both may succeed, one after the other; their values are equal. The file is closed before it is renamed, since not all
        such filesystems rename an open file, and some report lost bytes only at close.

        The partial name is removed: as long as a chunk has both names, evicting it frees nothing.
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
        """Syncs the chunk's name to disk. If that fails, the chunk is removed: a listed chunk has to survive a crash."""
        try:
            # A chunk that was evicted meanwhile has no name to sync, and its folder may be gone, too.
            with suppress(FileNotFoundError), directory(self.root) as root, directory(key[:2], root) as shard:
                sync_directory(shard)
        except OSError:
            with suppress(OSError):
                self.remove(key)
            raise

    @contextmanager
    def _claimed_root(self) -> Iterator[int]:
        """Opens the store's directory, after creating it if it is missing, and claims it."""
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
            # KV reveals its prompt, so the mode is private. Users who want to share a directory create it themselves.
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
        """Turns an OSError into a StoreError, except FileNotFoundError: an unreadable folder is not a missing one."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"The directory {self.root / name} cannot be listed: {advice(error)}") from error


def _entry(key: str, status: os.stat_result, now: float) -> Entry:
    return Entry(key, status.st_size, date_of_use(status.st_mtime, now))
