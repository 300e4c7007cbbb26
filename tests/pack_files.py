"""Packs of any bytes, made without a model and without the code that writes packs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from cake_hf.keys import canonical, namespace_digest
from cake_hf.stores.manifest import BLOCK_BYTES, MANIFEST, PackChunk, PackManifest, chunk_path

FACTS = {"chunk_size": 16, "format": "1", "layout": {"layers.0.keys": {"dtype": "F32"}}, "model": {"class": "Tiny"}}


def manifest_of(content: Mapping[str, bytes], **changes: Any) -> PackManifest:
    """A manifest for these files."""
    chunks = tuple(entry_of(key, index, value) for index, (key, value) in enumerate(content.items()))
    fields: dict[str, Any] = {
        "namespace": namespace_digest(canonical({**FACTS, "salt": ""})),
        "facts": FACTS,
        "salted": False,
        "model": "org/tiny",
        "model_revision": "",
        "dtype": "F32",
        "chunk_size": 16,
        "chunks": chunks,
    }
    return PackManifest(**{**fields, **changes})


def entry_of(key: str, index: int, value: bytes) -> PackChunk:
    """What a manifest says about a file."""
    blocks = tuple(blake3(value[at : at + BLOCK_BYTES]).hexdigest() for at in range(0, len(value), BLOCK_BYTES))
    return PackChunk(key, index, len(value), blake3(value).hexdigest(), blocks)


def pack_files(content: Mapping[str, bytes]) -> dict[str, bytes]:
    """All files of a pack, by path."""
    return {**{chunk_path(key): value for key, value in content.items()}, MANIFEST: manifest_of(content).to_json()}


def write_folder(folder: Path, content: Mapping[str, bytes]) -> Path:
    """A pack in a folder."""
    for path, raw in pack_files(content).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(raw)
    return folder
