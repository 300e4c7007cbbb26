"""The manifest of a pack: one JSON file that lists every file with its size and digests.

A pack's author may be a stranger. So the manifest is bounded before it is parsed, every field is checked, and files are found
by their keys alone: the manifest contains no paths. The metadata that makes its KV interchangeable is written out, and its
digest must be the namespace, so that a pack cannot claim to be made for one model and carry the keys of another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cake_hf.blocks import Block, blocks, tail_ends
from cake_hf.errors import StoreError
from cake_hf.keys import canonical, namespace_digest, state_key
from cake_hf.limits import MIN_CHUNK_SIZE
from cake_hf.util.forks import cached_property

MANIFEST = "cake_pack.json"
CARD = "README.md"
FORMAT = "cake_hf-pack"
VERSION = "1"
STATES_VERSION = "2"
"""Version of a manifest with snapshots. Readers that know only version 1 then report the version, not a damaged pack."""
CUTS_VERSION = "3"
"""Version of a manifest with boundaries, with or without snapshots."""

BLOCK_BYTES = 2**20
"""Bytes per digested block of a chunk's file, so that a part of the file can be checked by itself."""

MAX_MANIFEST_BYTES = 16 * 2**20
"""Enough for the digests of 200 GB of chunks. A longer manifest is refused before it is read. Parsing takes at most six times
as much memory, whatever the content."""
MAX_CHUNKS = 2**16
MAX_CHUNK_BYTES = 2**32
"""A larger file is refused before memory is allocated for it."""
MAX_BLOCKS = 2**18
"""Most blocks up to the last boundary of a pack, since they are enumerated one by one."""
MAX_TEXT = 200
MAX_DEPTH = 16
_MAX_STRUCTURE = MAX_MANIFEST_BYTES // 64 + 8 * MAX_CHUNKS
"""Most brackets, braces and commas, for which a JSON parser may need much memory: one per digest, eight per chunk."""

_KEY = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DTYPE = re.compile(r"[A-Z0-9_]{1,16}(, [A-Z0-9_]{1,16}){0,7}")
_REVISION = re.compile(r"[0-9a-f]{40}|")


@dataclass(frozen=True)
class PackChunk:
    """One file of a pack: a block (a chunk or a tail), or a snapshot of the model's recurrent state at the end of a block.

    Attributes:
        key: the file's key, which is its name.
        index: the block's number in its prompt; for a snapshot, the number of its block.
        size: bytes of the file.
        digest: blake3 of the file, 64 hexadecimal digits.
        blocks: blake3 of each run of `BLOCK_BYTES` in the file; the last run may be shorter.
    """

    key: str
    index: int
    size: int
    digest: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class PackManifest:
    """The content of a pack's manifest.

    Attributes:
        namespace: digest of the metadata that makes its KV interchangeable; part of every key.
        facts: the metadata behind that digest, as JSON values, without the salt.
        salted: whether the keys were made with a salt, which the pack does not reveal.
        model: the model's name, for people and for the card.
        model_revision: commit of the model on the Hub, 40 hexadecimal digits; empty if unknown.
        dtype: dtype of the KV, as safetensors names it.
        chunk_size: tokens per chunk.
        chunks: chunks and tails, by their position in the prompt.
        states: snapshots at the ends of some of them, in the same order.
        boundaries: tokens from the prompt's start to the end of each tail; empty if the pack has no tails.
    """

    namespace: str
    facts: Mapping[str, Any]
    salted: bool
    model: str
    model_revision: str
    dtype: str
    chunk_size: int
    chunks: tuple[PackChunk, ...]
    states: tuple[PackChunk, ...] = ()
    boundaries: tuple[int, ...] = ()

    @cached_property
    def by_key(self) -> dict[str, PackChunk]:
        """All files by name: the chunks, then the snapshots."""
        return {file.key: file for file in (*self.chunks, *self.states)}

    @property
    def tokens(self) -> tuple[int, int]:
        """The prompt's first token in the pack, and the one after the last."""
        return self.block(self.chunks[0].index).start, self.block(self.chunks[-1].index).end

    @cached_property
    def tails(self) -> tuple[PackChunk, ...]:
        """The elements of `chunks` that are not full chunks."""
        return tuple(chunk for chunk in self.chunks if not self.block(chunk.index).fills(self.chunk_size))

    @cached_property
    def _cut(self) -> list[Block]:
        """The blocks up to the last boundary."""
        return blocks(0, self.boundaries[-1], self.boundaries, self.chunk_size) if self.boundaries else []

    def block(self, index: int) -> Block:
        """Returns a block of the prompt by its number."""
        if index < len(self._cut):
            return self._cut[index]
        start = (self.boundaries[-1] if self.boundaries else 0) + (index - len(self._cut)) * self.chunk_size
        return Block(start, start + self.chunk_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in (*self.chunks, *self.states))

    def to_json(self) -> bytes:
        """Returns the manifest file.

        Raises:
            StoreError: the pack exceeds the limits of a manifest.
        """
        text = json.dumps(
            {
                "format": FORMAT,
                "version": CUTS_VERSION if self.boundaries else STATES_VERSION if self.states else VERSION,
                "namespace": self.namespace,
                "salted": self.salted,
                "model": self.model,
                "model_revision": self.model_revision,
                "dtype": self.dtype,
                "chunk_size": self.chunk_size,
                "tokens": self.tokens,
                "facts": self.facts,
                "chunks": _rows(self.chunks),
                **({"boundaries": self.boundaries} if self.boundaries else {}),
                **({"states": _rows(self.states)} if self.states else {}),
            },
            indent=1,
        ).encode()
        parse_manifest(text)  # a manifest that readers refuse must not be published
        return text


def chunk_path(key: str) -> str:
    """Returns the path of a chunk's file in a pack; the same as in a directory store."""
    return f"{key[:2]}/{key}.safetensors"


def printable(text: str) -> str:
    """Returns the text as a manifest accepts it: without control characters, and not too long."""
    return "".join(c if c.isprintable() else "?" for c in text.encode(errors="replace").decode())[-MAX_TEXT:]


def parse_manifest(raw: bytes) -> PackManifest:
    """Parses an untrusted manifest.

    Raises:
        StoreError: it is not a manifest of this format and version, or its fields are inconsistent.
    """
    if len(raw) > MAX_MANIFEST_BYTES or sum(map(raw.count, (b"{", b"[", b","))) > _MAX_STRUCTURE:
        raise StoreError(f"The pack's {MANIFEST} is larger than any that cake_hf writes.")
    try:
        if not raw.isascii():
            raise ValueError("it has characters that cake_hf writes otherwise")
        return _manifest(json.loads(raw, object_pairs_hook=_object))
    except (ValueError, RecursionError, OverflowError) as error:
        raise StoreError(f"The pack's {MANIFEST} is damaged or not cake_hf's: {_reason(error)}.") from error


def _manifest(fields: Any) -> PackManifest:
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError("it has another format")
    version = fields.get("version")
    if version not in (VERSION, STATES_VERSION, CUTS_VERSION):
        raise StoreError(
            "The pack was written in another version of the format; use the cake_hf that fits, or a new pack."
        )
    taken = _Fields(fields, "the manifest")
    chunks = tuple(_file(entry, "a chunk") for entry in taken.rows("chunks", 1, MAX_CHUNKS))
    size = taken.number("chunk_size", MIN_CHUNK_SIZE, 2**20)
    has_states = version == STATES_VERSION or (version == CUTS_VERSION and "states" in fields)
    manifest = PackManifest(
        namespace=taken.text("namespace", _KEY.fullmatch),
        facts=taken.facts("facts"),
        salted=taken.flag("salted"),
        model=taken.text("model", _is_plain),
        model_revision=taken.text("model_revision", _REVISION.fullmatch),
        dtype=taken.text("dtype", _DTYPE.fullmatch),
        chunk_size=size,
        chunks=chunks,
        states=_states(taken, len(chunks)) if has_states else (),
        boundaries=_boundaries(taken, size) if version == CUTS_VERSION else (),
    )
    _check_places(manifest)
    _check_boundaries(manifest)
    if taken.rows("tokens", 2, 2) != list(manifest.tokens):
        raise ValueError("its tokens are not those of its chunks")
    if manifest.facts.get("chunk_size") != manifest.chunk_size or "salt" in manifest.facts:
        raise ValueError("its facts do not fit")
    if not manifest.salted and namespace_digest(canonical({**manifest.facts, "salt": ""})) != manifest.namespace:
        raise ValueError("its facts do not give its namespace")
    taken.expect_only("format", "version")
    return manifest


def _states(taken: _Fields, most: int) -> tuple[PackChunk, ...]:
    return tuple(_file(entry, "a state") for entry in taken.rows("states", 1, most))


def _boundaries(taken: _Fields, size: int) -> tuple[int, ...]:
    """Returns the boundaries: ascending, and few enough to enumerate the blocks up to the last one."""
    found = taken.rows("boundaries", 1, MAX_BLOCKS)
    if any(type(cut) is not int or cut < 1 for cut in found):
        raise ValueError("a boundary is no number of tokens")
    if any(later <= cut for cut, later in pairwise(found)):
        raise ValueError("its boundaries do not increase")
    if found[-1] // size + len(found) > MAX_BLOCKS:
        raise ValueError(f"its boundaries make more than {MAX_BLOCKS:,} blocks")
    return tuple(found)


def _check_boundaries(manifest: PackManifest) -> None:
    """Raises unless each boundary ends a tail, and none is after the last token."""
    if not manifest.boundaries:
        return
    end = manifest.tokens[1]
    if manifest.boundaries[-1] > end:
        raise ValueError(f"a boundary is outside the prompt, of which it has {end:,} tokens")
    if list(manifest.boundaries) != tail_ends(manifest._cut, manifest.chunk_size):
        raise ValueError("one of its boundaries ends no tail")


def _check_places(manifest: PackManifest) -> None:
    """Raises unless file names and chunk positions are unique and each snapshot belongs to one of the chunks."""
    for files, what in ((manifest.chunks, "chunks"), (manifest.states, "states")):
        indices = [file.index for file in files]
        if indices != sorted(set(indices)):
            raise ValueError(f"its {what} are not in order, or not different ones")
    if len(manifest.by_key) != len(manifest.chunks) + len(manifest.states):
        raise ValueError("two of its files have one name")
    keys = {chunk.index: chunk.key for chunk in manifest.chunks}
    if any(state.index not in keys or state_key(keys[state.index]) != state.key for state in manifest.states):
        raise ValueError("its states are not those of its chunks")


def _rows(files: Sequence[PackChunk]) -> list[dict[str, Any]]:
    return [{"key": f.key, "index": f.index, "size": f.size, "blake3": f.digest, "blocks": f.blocks} for f in files]


def _file(entry: Any, what: str) -> PackChunk:
    taken = _Fields(entry, what)
    size = taken.number("size", 1, MAX_CHUNK_BYTES)
    blocks = -(-size // BLOCK_BYTES)
    file = PackChunk(
        key=taken.text("key", _KEY.fullmatch),
        index=taken.number("index", 0, 2**32),
        size=size,
        digest=taken.text("blake3", _DIGEST.fullmatch),
        blocks=tuple(_digest(text) for text in taken.rows("blocks", blocks, blocks)),
    )
    taken.expect_only()
    return file


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError("a block has no digest")
    return value


class _Fields:
    """The fields of a JSON object, taken and checked one by one; a failed check raises a ValueError."""

    def __init__(self, value: Any, what: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{what} is no object")
        self._value, self._what, self._taken = value, what, set[str]()

    def text(self, name: str, accept: Callable[[str], object]) -> str:
        value = self._take(name)
        if not isinstance(value, str) or not accept(value):
            raise self._wrong(name)
        return value

    def number(self, name: str, least: int, most: int) -> int:
        value = self._take(name)
        if type(value) is not int or not least <= value <= most:  # `type`, since a bool is an int
            raise self._wrong(name)
        return value

    def flag(self, name: str) -> bool:
        value = self._take(name)
        if not isinstance(value, bool):
            raise self._wrong(name)
        return value

    def rows(self, name: str, least: int, most: int) -> Sequence[Any]:
        value = self._take(name)
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise self._wrong(name)
        return value

    def facts(self, name: str) -> dict[str, Any]:
        value = self._take(name)
        if not isinstance(value, dict) or not _is_shallow(value, MAX_DEPTH):
            raise self._wrong(name)
        return value

    def expect_only(self, *others: str) -> None:
        """Raises if the object has fields beyond these and those already taken."""
        if unknown := sorted(set(self._value) - self._taken - set(others)):
            raise self._wrong(unknown[0])

    def _take(self, name: str) -> Any:
        self._taken.add(name)
        if name not in self._value:
            raise self._wrong(name)
        return self._value[name]

    def _wrong(self, name: str) -> ValueError:
        return ValueError(f"in {self._what}, {name[:MAX_TEXT]!a} is missing, unknown or out of range")


def _is_plain(text: str) -> bool:
    return text.isprintable() and len(text) <= MAX_TEXT


def _is_shallow(value: Any, depth: int) -> bool:
    """Returns whether a JSON value is nested no deeper than `depth`."""
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field stands twice")
    return found


def _reason(error: Exception) -> str:
    """Returns our own messages as they are; a parser's message, which may quote megabytes, is replaced."""
    own = type(error) is ValueError and len(str(error)) <= 2 * MAX_TEXT
    return str(error) if own else "it is no JSON"
