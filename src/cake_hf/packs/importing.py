"""Imports a pack into a store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch

from cake_hf.chunks.lossy import is_lossy
from cake_hf.chunks.stored_forms import check_any_file
from cake_hf.errors import CorruptChunk, StoreError
from cake_hf.packs.contents import Progress, no_progress, session_for
from cake_hf.stores.base import Store
from cake_hf.stores.hub import SCHEME, open_hub_pack
from cake_hf.stores.manifest import PackManifest
from cake_hf.stores.mismatch import lossy_codec
from cake_hf.stores.opening import StoreSpec, open_store, pack_folder
from cake_hf.stores.pack import PackStore, open_folder_pack
from cake_hf.stores.specs import path_directory

READS_AT_ONCE = 4
"""Chunks that are read at once, and so are in memory at the same time."""


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        url: the pack's URL, pinned to a commit if it is on the Hub.
        manifest: the pack's manifest.
        chunks: number of chunks written, tails included.
        states: number of snapshots of the model's recurrent state written.
        nbytes: bytes of all files written.
        tails: how many of the chunks are tails, which end at a declared boundary.
    """

    url: str
    manifest: PackManifest
    chunks: int
    states: int
    nbytes: int
    tails: int = 0


def import_pack(
    source: str | os.PathLike[str],
    store: StoreSpec,
    *,
    model: torch.nn.Module | None = None,
    salt: str = "",
    progress: Progress = no_progress,
) -> Imported:
    """Copies a pack's files into a store, each checked against the manifest. Files already in the store are not read again.

    Args:
        source: a folder, or `hf://org/pack@revision`.
        store: the store to copy to, as `CakeCache` takes it.
        model: if given, the pack is refused unless it can serve this model.
        salt: the salt that the pack was made with; used only together with `model`.
        progress: called with (files in the store, all files).

    Raises:
        StoreError: there is no such pack, it was made with another model, or the pack or the store fails.
        CorruptChunk: a chunk does not match the manifest; the chunks before it are in the store.
        CakeError: KV of this model is not kept.
    """
    with closing(open_pack(source)) as pack:
        if model is not None:
            refuse_foreign(pack, model, salt)
        with _opened(store) as target:
            target.check_writable()
            keys = list(pack.keys())
            wanted = [key for key, stored in zip(keys, target.contains(keys), strict=True) if not stored]
            there = len(keys) - len(wanted)
            progress(there, len(keys))
            with ThreadPoolExecutor(READS_AT_ONCE, "cake-import") as pool:
                copies = [pool.submit(_copy, pack, target, key) for key in wanted]
                try:
                    for done, copy in enumerate(copies, start=there + 1):
                        copy.result()
                        progress(done, len(keys))
                finally:
                    pool.shutdown(cancel_futures=True)
    nbytes = sum(pack.manifest.by_key[key].size for key in wanted)
    manifest, wrote = pack.manifest, set(wanted)
    states = sum(state.key in wrote for state in manifest.states)
    tails = sum(chunk.key in wrote for chunk in manifest.tails)
    return Imported(str(pack.source), manifest, len(wanted) - states, states, nbytes, tails)


def open_pack(source: str | os.PathLike[str]) -> PackStore:
    """Opens a pack in a folder or on the Hub, as a read-only store.

    Raises:
        StoreError: there is no such pack, or it cannot be read.
    """
    if isinstance(source, os.PathLike):
        return open_folder_pack(path_directory(source))
    return open_hub_pack(source) if source.startswith(SCHEME) else open_folder_pack(pack_folder(source))


def refuse_foreign(pack: PackStore, model: torch.nn.Module, salt: str = "") -> None:
    """Raises if no prompt of this model could ever find a chunk in the pack.

    Raises:
        StoreError: the pack cannot serve the model; the message says what is different.
        CakeError: KV of this model is not kept.
    """
    manifest = pack.manifest
    exact, codec = "numerics" in manifest.facts, lossy_codec(manifest.facts) or "none"
    if exact or not is_lossy(codec):
        codec = "none"  # one that is not known here; the reason says it
    with session_for(model, pack, chunk_size=manifest.chunk_size, salt=salt, exact=exact, codec=codec) as session:
        if mismatch_reason := pack.mismatch_reason(session.bound_model.namespace(), session.bound_model.metadata):
            raise StoreError(f"{mismatch_reason[0].upper()}{mismatch_reason[1:]}.")


def _copy(pack: PackStore, target: Store, key: str) -> None:
    raw = pack.read(key)
    if raw is None or check_any_file(raw, key).namespace != pack.manifest.namespace:
        raise CorruptChunk(f"Chunk {key} of {pack.source} is not of the namespace that its manifest names.")
    target.write(key, [raw])


@contextmanager
def _opened(store: StoreSpec) -> Iterator[Store]:
    """Opens a store, and closes it afterwards unless the caller passed a store object."""
    opened = open_store(store)
    try:
        yield opened
    finally:
        if opened is not store:
            opened.close()
