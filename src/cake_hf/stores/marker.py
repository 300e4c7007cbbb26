"""Tells a store's directory from a foreign one: by a marker file, or, for stores older than the marker, by their contents."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cake_hf.errors import StoreError
from cake_hf.stores.safe_paths import FoundFile, directory, entries_of, opened, status_of

MARKER = "cake-hf-store"
MARKER_TEXT = (
    b"This directory is a store of cake_hf, format 1: KV of prompts, to be computed again where it is missing.\n"
    b"Chunks are in folders of two digits; `cake-hf ls` lists them. The directory may be deleted as a whole.\n"
)

SUFFIX = ".safetensors"
PARTIAL = "partial"
NOTES = "notes"
BYTES = "bytes"
LOCK = "bytes.lock"
PINS = "pins"

SHARD = re.compile(r"[0-9a-f]{2}")
LEFTOVER = re.compile(r"(?:[0-9a-f]{40}|probe)\.[0-9a-f]{16}")
_CHUNK = re.compile(rf"([0-9a-f]{{40}}){re.escape(SUFFIX)}")
_NOTE = re.compile(r"(?:costs-[0-9a-f]{16}\.json|namespace-[0-9a-f]{40}\.json|hits\.log)(?:\.[0-9a-f]{8})?")
_PIN = re.compile(rb"(?:[0-9a-f]{40} [0-9]{1,12}\n(?s:.*))?")
_NUMBER = re.compile(rb"(?:[0-9]{20}\n)?")
_OF_FILESYSTEMS = re.compile(r"lost\+found|\.snapshots?|\.zfs|\.Trash.*|\.DS_Store|\.nfs.*|\.fuse_hidden.*")
"""Files that filesystems and desktops put into an otherwise empty directory."""


def key_in(shard: str, name: str) -> str | None:
    """Returns the key of the chunk whose file has that name in that folder; None if it is not a chunk's file."""
    found = _CHUNK.fullmatch(name)
    return found[1] if found and name.startswith(shard) else None


def is_store(root: int) -> bool:
    """Returns whether a directory is a store, or empty, like a store that was never written to.

    Raises:
        OSError: the directory cannot be accessed.
    """
    if status_of(MARKER, root) is not None:
        return True
    found = [entry for entry in entries_of(root) if not _OF_FILESYSTEMS.fullmatch(entry.name)]
    # A store whose chunks are all gone still has its folders.
    return any(_has_chunk(root, entry) for entry in found) or all(_is_ours(root, entry) for entry in found)


def claim(root: int, path: Path) -> None:
    """Marks a directory as a store, unless it holds other files.

    Raises:
        StoreError: the directory is neither empty nor a store.
        OSError: the directory cannot be accessed or written to.
    """
    if status_of(MARKER, root) is not None:
        return
    if not is_store(root):
        raise StoreError(
            f"The directory {path} holds other files and is no store of cake_hf, so nothing is written there; choose a new or "
            "an empty one."
        )
    with suppress(FileExistsError), opened(MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, root) as (descriptor, _):
        os.write(descriptor, MARKER_TEXT)


def _has_chunk(root: int, entry: FoundFile) -> bool:
    if not entry.is_directory or not SHARD.fullmatch(entry.name):
        return False
    return _any_of(root, entry.name, lambda inner: _is_chunk(entry.name, inner))


def _is_ours(root: int, entry: FoundFile) -> bool:
    name = entry.name
    if name in (MARKER, LOCK):  # another process may have just created the marker
        return entry.is_file
    if name in (BYTES, PINS):
        return entry.is_file and _begins_as(name, {BYTES: _NUMBER, PINS: _PIN}[name], root)
    if not entry.is_directory:
        return False
    if SHARD.fullmatch(name):
        return not _any_of(root, name, lambda inner: not _is_chunk(name, inner))
    names = {PARTIAL: LEFTOVER, NOTES: _NOTE}.get(name)
    return names is not None and not _any_of(
        root, name, lambda inner: not (inner.is_file and names.fullmatch(inner.name))
    )


def _is_chunk(shard: str, entry: FoundFile) -> bool:
    return entry.is_file and key_in(shard, entry.name) is not None


def _begins_as(name: str, form: re.Pattern[bytes], root: int) -> bool:
    with opened(name, os.O_RDONLY, root) as (descriptor, _):
        return form.fullmatch(os.read(descriptor, 99)) is not None


def _any_of(root: int, name: str, wanted: Callable[[FoundFile], bool]) -> bool:
    with directory(name, root) as folder:
        return any(map(wanted, entries_of(folder)))
