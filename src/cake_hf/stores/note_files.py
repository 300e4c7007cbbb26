"""Notes of a directory store: one small file each, beside the files with measured costs."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from cake_hf.stores.base import MAX_NOTE_BYTES, MOST_NOTES
from cake_hf.stores.marker import NOTES, is_store
from cake_hf.stores.safe_paths import directory, files_of, make_directory, opened, replace_file

_NAME = re.compile(r"namespace-([0-9a-f]{40})\.json")


def read_notes(root: Path) -> dict[str, bytes]:
    """Returns the notes written last, by name; files that are too long for a note are left out.

    Raises:
        OSError: the directory cannot be accessed.
    """
    try:
        with directory(root) as at, directory(NOTES, at) as folder:
            found = sorted(files_of(folder, _NAME.fullmatch), key=lambda file: -file[1].st_mtime)
            return {_name(file): content for file, _ in found[:MOST_NOTES] if (content := _content(file, folder))}
    except FileNotFoundError:
        return {}


def write_note(root: Path, name: str, note: bytes | None) -> None:
    """Replaces a note, or removes it if `note` is None. Nothing is written to a directory that is not a store.

    Raises:
        OSError: the note cannot be written.
    """
    with suppress(FileNotFoundError), directory(root) as at:
        if note is not None and is_store(at):
            make_directory(NOTES, at)
        with directory(NOTES, at) as folder:
            if note is None:
                os.unlink(_file(name), dir_fd=folder)
            elif is_store(at):
                replace_file(_file(name), note, folder)


def _content(file: str, folder: int) -> bytes | None:
    with suppress(FileNotFoundError), opened(file, os.O_RDONLY, folder) as (descriptor, status):
        if status.st_size <= MAX_NOTE_BYTES:
            return os.read(descriptor, MAX_NOTE_BYTES)
    return None


def _file(name: str) -> str:
    return f"namespace-{name}.json"


def _name(file: str) -> str:
    return file.removeprefix("namespace-").removesuffix(".json")
