"""Names for chunks: a digest chained over (namespace, parent key, token ids).

Chunk `i`'s key fixes every token from the start of the prompt to the chunk's end. So equal keys mean equal prefixes,
and a chunk can be used even where the chunks before it are not stored.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

from cake_hf.blocks import Block, blocks

TOKEN_BYTES = 8
KEY_BYTES = 20


def namespace_digest(facts: str) -> str:
    """Digest of everything but the tokens that must be equal for KV to be interchangeable.

    Args:
        facts: canonical text of those facts (the caller serialises them in one fixed way).

    Returns:
        40 hexadecimal digits.
    """
    return hashlib.blake2b(facts.encode(), digest_size=KEY_BYTES, person=b"cake-namespace").hexdigest()


def chunk_keys(
    namespace: str,
    token_ids: Sequence[int] | memoryview,
    chunk_size: int,
    parent: str = "",
    marks: Sequence[bytes] = (),
) -> list[str]:
    """Keys of all full chunks of a prompt; tokens after the last full chunk are ignored.

    Args:
        namespace: 40 hexadecimal digits from `namespace_digest`.
        token_ids: the prompt, or what follows the chunk named by `parent`. As a memoryview of signed 64-bit integers it is
            not copied, which takes a tenth of the time.
        chunk_size: tokens per chunk.
        parent: key of the chunk just before `token_ids`; empty at the start of a prompt.
        marks: for each full chunk a digest of what else shapes its KV, such as an image behind its tokens; empty for nothing.

    Returns:
        `len(token_ids) // chunk_size` keys of 40 hexadecimal digits.
    """
    chunks = blocks(0, len(token_ids) // chunk_size * chunk_size, (), chunk_size)
    return block_keys(namespace, token_ids, chunks, chunk_size, parent, marks)


def block_keys(
    namespace: str,
    token_ids: Sequence[int] | memoryview,
    named: Sequence[Block],
    chunk_size: int,
    parent: str = "",
    marks: Sequence[bytes] = (),
) -> list[str]:
    """Keys of blocks that follow each other; see `chunk_keys`.

    How a block's tokens are run is part of its key: a chunk, a tail and single tokens are digests of their own kinds.

    Args:
        namespace: 40 hexadecimal digits from `namespace_digest`.
        token_ids: the prompt, or what is new of it.
        named: the blocks, counted from the first of these tokens on.
        chunk_size: tokens of a full chunk.
        parent: key of what is just before the first block; empty at the start of a prompt.
        marks: for each block a digest of what else shapes its KV; empty for nothing.
    """
    root = bytes.fromhex(namespace)
    previous = bytes.fromhex(parent or namespace)
    raw, keys = _raw(token_ids), []
    for number, block in enumerate(named):
        digest = hashlib.blake2b(root, digest_size=KEY_BYTES, person=_kind(block, chunk_size))
        digest.update(previous)
        digest.update(raw[block.start * TOKEN_BYTES : block.end * TOKEN_BYTES])
        if marks:
            digest.update(marks[number])
        previous = digest.digest()
        keys.append(previous.hex())
    return keys


def state_key(chunk_key: str) -> str:
    """Name of what a model carries over the end of a chunk, beside the KV of its tokens."""
    return hashlib.blake2b(bytes.fromhex(chunk_key), digest_size=KEY_BYTES, person=b"cake-state").hexdigest()


def behaviour_key(namespace: str) -> str:
    """Name of what the model computed whose KV lies under a namespace, see `model.reference`."""
    return hashlib.blake2b(bytes.fromhex(namespace), digest_size=KEY_BYTES, person=b"cake-behaviour").hexdigest()


def _kind(block: Block, chunk_size: int) -> bytes:
    if block.singly:
        return b"cake-single"
    return b"cake-chunk" if block.tokens == chunk_size else b"cake-tail"


def _raw(token_ids: Sequence[int] | memoryview) -> memoryview:
    """64-bit little-endian, whatever the machine."""
    if isinstance(token_ids, memoryview):
        whole = token_ids.format in ("l", "q") and token_ids.itemsize == TOKEN_BYTES
        if whole and sys.byteorder == "little":
            return token_ids.cast("B")
    tokens = array("q", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return memoryview(tokens).cast("B")
