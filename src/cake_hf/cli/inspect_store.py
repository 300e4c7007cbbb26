"""The content of a store, read from the chunks' headers alone: by namespace, by prompt, and one chunk in full."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from cake_hf.chunks.codec import MAX_HEADER_BYTES, ChunkMetadata, parse_header
from cake_hf.chunks.encoded_header import is_encoded, parse_encoded_header
from cake_hf.chunks.stored_forms import refuse_newer
from cake_hf.chunks.tensor_table import TensorTable
from cake_hf.cli.many import each_answer
from cake_hf.errors import CorruptChunk, StoreError
from cake_hf.keys import behaviour_key, state_key
from cake_hf.stores import LocalStore, Store, open_store
from cake_hf.stores.opening import directory_of
from cake_hf.util.redaction import escaped, shown

Progress = Callable[[int, int], None]

FIRST_BYTES = 2**15
"""This many bytes hold the whole header of chunks with up to 100 layers, and cost hardly more to read than eight bytes."""

MAX_INDEX = 2**40
MAX_TEXT = 500
"""Bounds within which values of a header are shown to people; a header may say anything."""


@dataclass(frozen=True)
class StoredChunk:
    """One chunk, as its header describes it.

    Attributes:
        metadata: key, parent, place on the grid, namespace, model, checksums.
        table: the table of its tensors; of those that an encoded chunk decodes to.
        file_bytes: size of header and payload.
        payload_bytes: of the file without its header.
        codec: "none", or that of an encoded chunk.
    """

    metadata: ChunkMetadata
    table: TensorTable
    file_bytes: int
    payload_bytes: int
    codec: str = "none"

    @property
    def chunk_size(self) -> int:
        """Its number of tokens."""
        return self.table.chunk_size


@dataclass
class Inventory:
    """All chunks of a store, without the checksums of their pieces, which would take most of the memory.

    Attributes:
        chunks: by key.
        states: by key, the stored snapshots of recurrent states.
        behaviours: by key, the recorded results of the models that the chunks are from; one for each namespace with
            `exact=False`.
        unreadable: key -> why its header cannot be read.
    """

    chunks: dict[str, StoredChunk] = field(default_factory=dict)
    states: dict[str, StoredChunk] = field(default_factory=dict)
    behaviours: dict[str, StoredChunk] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def file_bytes(self) -> int:
        """Bytes of all readable chunks, snapshots and recorded results."""
        return total_file_bytes([*self.chunks.values(), *self.states.values(), *self.behaviours.values()])

    @property
    def tokens(self) -> int:
        """Tokens whose KV is stored; those of a prefix that several prompts share count once."""
        return sum(chunk.chunk_size for chunk in self.chunks.values())


@dataclass
class Namespace:
    """The chunks that one model can use with one set of options."""

    digest: str
    chunks: list[StoredChunk] = field(default_factory=list)

    @property
    def first(self) -> StoredChunk:
        """A full chunk, if there is one: model, dtype and chunk size are the same in all of them."""
        return max(self.chunks, key=lambda chunk: chunk.chunk_size)

    @property
    def tokens(self) -> int:
        """Tokens in all chunks."""
        return sum(chunk.chunk_size for chunk in self.chunks)


@dataclass(frozen=True)
class Chain:
    """A prompt's chunks, found from its last one by following parents.

    Attributes:
        leaf: the last chunk.
        first: index of the first chunk that was found; 0 if the prompt is complete.
        stored_tokens: in the chunks that were found.
    """

    leaf: StoredChunk
    first: int
    stored_tokens: int

    @property
    def chunks(self) -> int:
        """How many of its chunks are stored."""
        return self.leaf.metadata.index + 1 - self.first

    def tokens(self, chunk_size: int) -> int:
        """Tokens up to its end; missing chunks are assumed to be full."""
        return self.first * chunk_size + self.stored_tokens


def existing_store(spec: str) -> Store:
    """Opens a store that must exist: looking must not make an empty one, and does not count as a use of its chunks.

    Raises:
        StoreError: there is none.
    """
    store = open_store(spec)
    store.look_only()
    if isinstance(store, LocalStore):
        path = directory_of(spec)
        if not store.exists():
            raise StoreError(f"There is no store at {path}; `cake-hf warm MODEL FILE --store {path}` makes one.")
        if not store.is_store():
            raise StoreError(
                f"The directory {path} is no store of cake_hf: it has neither a store's marker nor chunks; check the path."
            )
    return store


def take_inventory(store: Store, progress: Progress) -> Inventory:
    """Reads the headers of all chunks.

    Args:
        store: any.
        progress: called with (chunks read, all chunks).
    """
    inventory, keys = Inventory(), list(store.keys())
    with closing(each_answer(keys, partial(_listed, store))) as answers:
        for count, (key, chunk) in enumerate(answers, start=1):
            if isinstance(chunk, str):
                inventory.unreadable[key] = chunk
            elif chunk is not None:
                _part_for(chunk.metadata, inventory)[key] = chunk
            progress(count, len(keys))
    return inventory


def read_chunk(store: Store, key: str) -> StoredChunk | None:
    """Returns a chunk's header, after comparing it with the file; None if the chunk is gone.

    Raises:
        CorruptChunk: the header cannot be read, is another chunk's, or the file has another length.
        StoreError: it cannot be read.
    """
    size = store.size(key)
    raw = None if size is None else _read_start(store, key, size)
    return None if size is None or raw is None else chunk_of(raw, key, size)


def chunk_of(raw: bytearray, key: str, size: int) -> StoredChunk:
    """Parses the start of a chunk's file.

    Args:
        raw: the header at least.
        size: of the file.

    Raises:
        CorruptChunk: the header cannot be read, is another chunk's, or the file has another length.
    """
    metadata, table, payload_bytes, codec = _described(raw)
    (length,) = struct.unpack("<Q", raw[:8])
    if metadata.key != key:
        raise CorruptChunk(f"The file named {key} says that it is {escaped(metadata.key[:MAX_TEXT])}.")
    if size != 8 + length + payload_bytes:
        raise CorruptChunk(f"Chunk {key} has {size} bytes, which is not what its header says.")
    if not table:
        raise CorruptChunk(f"Chunk {key} holds no tensors.")
    if not 0 <= metadata.index < MAX_INDEX:
        raise CorruptChunk(f"Chunk {key} names a place where no chunk can be.")
    name = _shown_name(metadata.model)
    return StoredChunk(
        metadata if name == metadata.model else replace(metadata, model=name), table, size, payload_bytes, codec
    )


def _described(raw: bytearray) -> tuple[ChunkMetadata, TensorTable, int, str]:
    """Returns a chunk's metadata, the table of its tensors, the bytes of its payload as it is stored, and its codec."""
    if is_encoded(raw):
        encoded, layout = parse_encoded_header(raw)
        return encoded.facts, _table(layout.table_json), encoded.sizes.nbytes, encoded.codec
    refuse_newer(raw)
    metadata, table = parse_header(raw)
    return metadata, table, table.payload_bytes, "none"


@lru_cache(8)
def _table(text: str) -> TensorTable:
    """Returns the table with that text; most chunks of a store have the same one."""
    return TensorTable(json.loads(text))


def namespaces(inventory: Inventory) -> list[Namespace]:
    """Returns the chunks by namespace, the largest first."""
    found: dict[str, Namespace] = {}
    for chunk in inventory.chunks.values():
        found.setdefault(chunk.metadata.namespace, Namespace(chunk.metadata.namespace)).chunks.append(chunk)
    return sorted(found.values(), key=lambda namespace: -sum(chunk.file_bytes for chunk in namespace.chunks))


def prompts(inventory: Inventory) -> list[Chain]:
    """Returns the chunks by prompt, the longest first. Prompts that share a prefix share its chunks."""
    chunks = inventory.chunks
    parents = {chunk.metadata.parent for chunk in chunks.values()}
    chains = [_chain(leaf, chunks) for key, leaf in chunks.items() if key not in parents]
    sizes = chunk_sizes(inventory)
    return sorted(chains, key=lambda chain: -chain.tokens(sizes[chain.leaf.metadata.namespace]))


def chunk_sizes(inventory: Inventory) -> dict[str, int]:
    """Returns the tokens of a full chunk for each namespace that has one."""
    return {namespace.digest: namespace.first.chunk_size for namespace in namespaces(inventory)}


def find_chunk(store: Store, prefix: str) -> StoredChunk:
    """Returns the one chunk whose key starts with these digits.

    Raises:
        StoreError: no key does, or several do.
        CorruptChunk: its header cannot be read.
    """
    keys = list(filter(lambda key: key.startswith(prefix.lower()), store.keys()))
    if len(keys) > 1:
        raise StoreError(f"{len(keys)} chunks have keys that start with {prefix}; give more digits.")
    chunk = read_chunk(store, keys[0]) if keys else None
    if chunk is None:
        raise StoreError(f"No chunk's key starts with {prefix}; `cake-hf ls` lists them.")
    return chunk


def _chain(leaf: StoredChunk, chunks: dict[str, StoredChunk]) -> Chain:
    """Follows parents from a leaf as far as they are stored. Indices must fall by one, so the walk ends on any input."""
    current, tokens = leaf, leaf.chunk_size
    while (parent := chunks.get(current.metadata.parent)) and parent.metadata.index == current.metadata.index - 1:
        current, tokens = parent, tokens + parent.chunk_size
    return Chain(leaf, current.metadata.index, tokens)


def _read_start(store: Store, key: str, size: int) -> bytearray | None:
    """Reads at least a value's header, and no more if the store can read a part. Takes memory only for what is there."""
    if not store.reads_ranges:
        return store.read(key)
    start = bytearray(min(FIRST_BYTES, size))
    if not store.read_range(key, [memoryview(start)], 0):
        return None
    length = 8 + int.from_bytes(start[:8], "little")
    if length <= len(start) or length > min(size, 8 + MAX_HEADER_BYTES):
        return start  # if that is not a header, parse_header says what is wrong with it
    whole = bytearray(length)
    return whole if store.read_range(key, [memoryview(whole)], 0) else None


def _part_for(metadata: ChunkMetadata, inventory: Inventory) -> dict[str, StoredChunk]:
    """Returns the part of a chunk that a key is for: a state has its chunk as parent; its key, and that of a model's
    recorded results, follow from other keys."""
    with suppress(ValueError):  # it is not a key at all
        if metadata.key == state_key(metadata.parent):
            return inventory.states
        if metadata.key == behaviour_key(metadata.namespace):
            return inventory.behaviours
    return inventory.chunks


def _listed(store: Store, key: str) -> StoredChunk | str | None:
    """Returns a chunk's entry in an inventory, or why it cannot be read; None if it is gone."""
    try:
        chunk = read_chunk(store, key)
    except CorruptChunk as error:
        return shown(error)
    return None if chunk is None else replace(chunk, metadata=replace(chunk.metadata, checksums=()))


@lru_cache(256)
def _shown_name(model: str) -> str:
    """Returns a model's name as shown; most chunks of a store have the same name."""
    return shown(model[:MAX_TEXT])


def total_file_bytes(chunks: Iterable[StoredChunk]) -> int:
    """Returns the total size of some chunks, in bytes."""
    return sum(chunk.file_bytes for chunk in chunks)
