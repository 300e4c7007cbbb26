"""The stores that need no server, each beside the machine's raw speed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.bare import read_file
from benchmarks.stores.race import Contender, read
from benchmarks.stores.values import StoreSettings, Values
from cake_hf.packs.export import FolderSink
from cake_hf.stores.base import Store
from cake_hf.stores.folder import Folder
from cake_hf.stores.local import LocalStore
from cake_hf.stores.manifest import MANIFEST, PackChunk, PackManifest, chunk_path
from cake_hf.stores.memory import MemoryStore
from cake_hf.stores.pack import block_digests, digest_of, open_folder_pack
from cake_hf.stores.pieces import address_of
from cake_hf.stores.tiers import TierStore


def fill(store: Store, values: Values) -> None:
    """Writes all chunks."""
    for key, file in zip(values.keys, values.files, strict=True):
        store.write(key, [file])


@contextmanager
def memory(values: Values, settings: StoreSettings, folder: Path) -> Iterator[Contender]:
    """Measures memory, beside a copy of it."""
    with MemoryStore() as store:
        fill(store, values)
        for file, flat in zip(values.files, values.flat, strict=True):
            flat[:] = file
        held = [address_of(flat) for flat in values.flat]
        yield Contender("memory", store, {"memmove": lambda n: _move(held[n], values.parts[n])})


@contextmanager
def local(values: Values, settings: StoreSettings, folder: Path) -> Iterator[Contender]:
    """Measures a directory, beside preadv of its files (from the page cache, since they were just written)."""
    with LocalStore(folder / "local", budget=None) as store:
        fill(store, values)
        paths = [Folder(folder / "local").path(key) for key in values.keys]
        yield Contender("directory", store, {"preadv": lambda n: read_file(paths[n], values.parts[n])})


@contextmanager
def pack(values: Values, settings: StoreSettings, folder: Path) -> Iterator[Contender]:
    """Measures a pack in a folder, beside preadv of its files and the digest that each byte of a pack needs before use."""
    write_pack(values, settings, folder / "pack")

    def raw(number: int) -> None:
        read_file(str(folder / "pack" / chunk_path(values.keys[number])), values.parts[number])
        digest_of(values.parts[number])

    with open_folder_pack(folder / "pack") as store:
        yield Contender("pack in a folder", store, {"preadv and blake3": raw})


def write_pack(values: Values, settings: StoreSettings, folder: Path) -> None:
    """Writes all chunks as a pack."""
    chunks = tuple(
        PackChunk(key, index, len(file), digest_of([file]), block_digests(memoryview(file)))
        for index, (key, file) in enumerate(zip(values.keys, values.files, strict=True))
    )
    facts = settings.facts()
    manifest = PackManifest(values.namespace, facts, False, "random", "", "BF16", settings.tokens, chunks)
    sink = FolderSink(folder)
    for key, file in zip(values.keys, values.files, strict=True):
        sink.add(chunk_path(key), file)
    sink.finish({MANIFEST: manifest.to_json()})


@contextmanager
def tiers(values: Values, settings: StoreSettings, folder: Path) -> Iterator[Contender]:
    """Measures memory before a directory, beside that memory alone."""
    with MemoryStore() as near, LocalStore(folder / "far", budget=None) as far, TierStore([near, far]) as store:
        fill(store, values)
        raw = partial(read, near, values)
        yield Contender("tiers: memory, directory", store, {"the nearest alone": raw})


def _move(source: int, parts: Sequence[memoryview]) -> None:
    for part in parts:
        ctypes.memmove(address_of(part), source, part.nbytes)
        source += part.nbytes
