"""Exports a pack to a folder, to be copied, put on a share, or inspected before it is published."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from cake_hf.errors import StoreError
from cake_hf.packs.card import About, card_text
from cake_hf.packs.contents import Progress, Sink, contents_of, no_progress
from cake_hf.stores.manifest import MANIFEST, PackManifest, chunk_path
from cake_hf.stores.opening import StoreSpec
from cake_hf.stores.pack import open_folder_pack
from cake_hf.stores.safe_paths import directory, make_directory, replace_file, what_is
from cake_hf.stores.specs import expanded


def export_pack(
    store: StoreSpec,
    folder: str | os.PathLike[str],
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    *,
    boundaries: Iterable[int] = (),
    chunk_size: int | str = "auto",
    salt: str = "",
    exact: bool = True,
    allow_salted: bool = False,
    about: str = "",
    base_model: str = "",
    codec: str = "none",
    progress: Progress = no_progress,
) -> PackManifest:
    """Writes the stored KV of a prompt as a pack: chunks, a manifest with the digest of every file, and a card.

    The pack includes the tail at the end of a document, if `CakeCache.prefill` has stored it. For a model with recurrent
    states, it also includes the stored snapshots at the ends of chunks and tails.

    Args:
        store: the store that has the KV, as `CakeCache` takes it.
        folder: the folder to write to: new, empty, or with an older pack, which is replaced.
        model, chunk_size, salt, exact: as they were when the KV was saved. A pack made with `exact=True` serves only
            identical numerics; for use elsewhere the KV has to be saved and exported with `exact=False`.
        input_ids: the prompt, `[1, tokens]`.
        boundaries: the cuts of the prompt when the KV was saved, besides its end: those passed to `prefill` or `generate`, or
            `CakeCache.boundaries` for a conversation.
        allow_salted: export KV even if it was saved under a salt. The pack does not reveal the salt, but a short salt can be
            guessed.
        about: description of the prompt, in one line for the card.
        base_model: the model's name on the Hub, for the card; by default the name that it was loaded by.
        codec: the lossy codec that the KV was saved with, if it was.
        progress: called with (files written, all files).

    Returns:
        The pack's manifest.

    Raises:
        StoreError: the store has nothing of the prompt, the store or the folder fails, or a salt is given without
            `allow_salted`.
        CorruptChunk: a chunk is damaged.
        CakeError: KV of this model is not kept.
        TypeError: the boundaries are not integers.
        ValueError: `input_ids` is not a single prompt, or it is shorter than a chunk and its end is not stored; or a boundary
            is outside the prompt.
    """
    told = About(about, base_model)
    options: dict[str, Any] = {"chunk_size": chunk_size, "salt": salt, "exact": exact, "codec": codec}
    with contents_of(store, model, input_ids, boundaries=boundaries, allow_salted=allow_salted, **options) as contents:
        return contents.write(FolderSink(folder), partial(card_text, about=told), progress)


class FolderSink(Sink):
    """Writes a pack to a folder.

    An older pack's manifest is removed first and the new one is written last, so a pack with a manifest is complete.

    Args:
        folder: new, empty, or with an older pack.

    Raises:
        StoreError: the folder holds something else, or cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = expanded(folder).absolute()
        self.name = f"pack:{self._folder.name}"
        self._stale: set[str] = set()
        with self._plain_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            if any(self._folder.iterdir()):
                self._stale = self._files_of_an_older_pack()
                self._remove(MANIFEST)

    def add(self, path: str, raw: bytes | bytearray) -> None:
        self._stale.discard(path)
        self._write(path, raw)

    def finish(self, files: Mapping[str, bytes]) -> None:
        for path in self._stale:
            self._remove(path)
        for name in sorted(files, key=lambda name: name == MANIFEST):
            self._write(name, files[name])

    def _write(self, path: str, raw: bytes | bytearray) -> None:
        with self._plain_errors(), directory(self._folder) as root:
            folder, _, name = path.rpartition("/")
            if folder:
                make_directory(folder, root)
            with self._below(folder, root) as at:
                replace_file(name, raw, at)

    def _remove(self, path: str) -> None:
        """Removes a file of the pack, without following links."""
        folder, _, name = path.rpartition("/")
        told, gone = self._plain_errors(), suppress(FileNotFoundError)
        with told, gone, directory(self._folder) as root, self._below(folder, root) as at:
            if what_is(name, at) is not None:
                os.unlink(name, dir_fd=at)

    @contextmanager
    def _below(self, folder: str, root: int) -> Iterator[int]:
        if folder:
            with directory(folder, root) as at:
                yield at
        else:
            yield root

    def _files_of_an_older_pack(self) -> set[str]:
        try:
            return set(map(chunk_path, open_folder_pack(self._folder).keys()))
        except StoreError as error:
            raise StoreError(f"The folder {self._folder} holds something else than a pack; give a new one.") from error

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = os.strerror(error.errno) if error.errno else str(error)
            raise StoreError(
                f"The pack cannot be written to {self._folder}: {what}; check the path and the disk."
            ) from error
