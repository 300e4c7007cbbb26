"""Names of chunks: digests chained over (namespace, parent key, token ids).

The key of chunk `i` fixes every token from the start of the prompt to the end of the chunk. Equal keys therefore mean equal
prefixes, and a chunk can be used even if the chunks before it are not stored.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from cake_hf.blocks import Block, blocks

TOKEN_BYTES = 8
KEY_BYTES = 20


def namespace_digest(metadata: str) -> str:
    """Returns the digest of everything, beside the tokens, that must be equal for KV to be interchangeable.

    Args:
        metadata: canonical text of it (the caller serialises it in one fixed way).

    Returns:
        40 hexadecimal digits.
    """
    return hashlib.blake2b(metadata.encode(), digest_size=KEY_BYTES, person=b"cake-namespace").hexdigest()


def chunk_keys(
    namespace: str,
    token_ids: Sequence[int] | memoryview,
    chunk_size: int,
    parent: str = "",
    extra_hashes: Sequence[bytes] = (),
) -> list[str]:
    """Returns the keys of all full chunks of a prompt; tokens after the last full chunk are ignored.

    Args:
        namespace: 40 hexadecimal digits from `namespace_digest`.
        token_ids: the prompt, or what follows the chunk named by `parent`. A memoryview of signed 64-bit integers is not
            copied, which takes a tenth of the time.
        chunk_size: tokens per chunk.
        parent: key of the chunk just before `token_ids`; empty at the start of a prompt.
        extra_hashes: one per full chunk, a digest of what else shapes its KV, such as an image behind its tokens; empty if
            nothing does.

    Returns:
        `len(token_ids) // chunk_size` keys of 40 hexadecimal digits.
    """
    chunks = blocks(0, len(token_ids) // chunk_size * chunk_size, (), chunk_size)
    return block_keys(namespace, token_ids, chunks, chunk_size, parent, extra_hashes)


def block_keys(
    namespace: str,
    token_ids: Sequence[int] | memoryview,
    named: Sequence[Block],
    chunk_size: int,
    parent: str = "",
    extra_hashes: Sequence[bytes] = (),
) -> list[str]:
    """Returns the keys of consecutive blocks; see `chunk_keys`.

    How a block's tokens are run is part of its key: chunks, tails and single tokens have digests of different kinds.

    Args:
        namespace: 40 hexadecimal digits from `namespace_digest`.
        token_ids: the prompt, or its new part.
        named: the blocks, with positions relative to the first of these tokens.
        chunk_size: tokens of a full chunk.
        parent: key of the block just before the first one; empty at the start of a prompt.
        extra_hashes: one per block, a digest of what else shapes its KV; empty if nothing does.
    """
    root = bytes.fromhex(namespace)
    previous = bytes.fromhex(parent or namespace)
    raw, keys = _raw(token_ids), []
    for number, block in enumerate(named):
        digest = hashlib.blake2b(root, digest_size=KEY_BYTES, person=_kind(block, chunk_size))
        digest.update(previous)
        digest.update(raw[block.start * TOKEN_BYTES : block.end * TOKEN_BYTES])
        if extra_hashes:
            digest.update(extra_hashes[number])
        previous = digest.digest()
        keys.append(previous.hex())
    return keys


def state_key(chunk_key: str) -> str:
    """Returns the key of the state that a model carries past the end of a chunk, beside the KV of the chunk's tokens."""
    return hashlib.blake2b(bytes.fromhex(chunk_key), digest_size=KEY_BYTES, person=b"cake-state").hexdigest()


def behaviour_key(namespace: str) -> str:
    """Returns the key of the recorded behaviour of the model whose KV is stored under a namespace, see `model.reference`."""
    return hashlib.blake2b(bytes.fromhex(namespace), digest_size=KEY_BYTES, person=b"cake-behaviour").hexdigest()


def _kind(block: Block, chunk_size: int) -> bytes:
    if block.singly:
        return b"cake-single"
    return b"cake-chunk" if block.end - block.start == chunk_size else b"cake-tail"


def _raw(token_ids: Sequence[int] | memoryview) -> memoryview:
    """Returns the token ids as 64-bit little-endian bytes, whatever the machine's byte order."""
    if isinstance(token_ids, memoryview):
        whole = token_ids.format in ("l", "q") and token_ids.itemsize == TOKEN_BYTES
        if whole and sys.byteorder == "little":
            return token_ids.cast("B")
    tokens = array("q", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return memoryview(tokens).cast("B")


def canonical(facts: Any) -> str:
    """Returns metadata as text, the same for equal metadata."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
