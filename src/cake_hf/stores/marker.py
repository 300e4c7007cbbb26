"""What tells a store's directory from somebody's own: a file that says so, or, in stores older than that, what is in them."""

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
_NOBODYS = re.compile(r"lost\+found|\.snapshots?|\.zfs|\.Trash.*|\.DS_Store|\.nfs.*|\.fuse_hidden.*")
"""What filesystems and desktops put into a directory that is empty otherwise."""


def key_in(shard: str, name: str) -> str | None:
    """The key of the chunk whose file has that name in that folder; None if it is no chunk's."""
    found = _CHUNK.fullmatch(name)
    return found[1] if found and name.startswith(shard) else None


def is_store(root: int) -> bool:
    """Whether a directory is a store, or empty, as one is that nothing was written to yet.

    Raises:
        OSError: it cannot be looked at.
    """
    if status_of(MARKER, root) is not None:
        return True
    found = [entry for entry in entries_of(root) if not _NOBODYS.fullmatch(entry.name)]
    # One whose chunks have all gone has still its folders.
    return any(_has_chunk(root, entry) for entry in found) or all(_is_ours(root, entry) for entry in found)


def claim(root: int, path: Path) -> None:
    """Let a directory be a store from now on, unless it is somebody's own.

    Args:
        root: descriptor of the directory.
        path: of it, for the message.

    Raises:
        StoreError: there is something in it, and it is no store.
        OSError: it cannot be looked at, or not be written to.
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
    if name in (MARKER, LOCK):  # the marker may have come just now
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
