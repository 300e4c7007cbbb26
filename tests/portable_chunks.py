"""Chunks written with exact=False on some versions of transformers, kept with the tests so that all others can read them.

    PYTHONPATH=src:tests python tests/portable_chunks.py

writes those of the installed version anew. That is needed only after a change of the format at rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from cake_hf import CakeCache, MemoryStore
from models import CHUNK, build, prompt

FOLDER = Path(__file__).parent / "data" / "portable"
VERSIONS = sorted(path.name for path in FOLDER.iterdir())
IDS = prompt(2 * CHUNK + 5)


def portable_cache(store: MemoryStore, *, seed: int = 0, **options: Any) -> CakeCache:
    """A cache on the model that these chunks are of, or on another one."""
    return CakeCache(build("llama", seed=seed), store, chunk_size=CHUNK, exact=False, **options)


def kept_chunks(version: str) -> MemoryStore:
    """A store with the chunks that this version of transformers wrote."""
    store = MemoryStore()
    for path in (FOLDER / version).iterdir():
        store.write(path.stem, [path.read_bytes()])
    return store


def main() -> None:
    store = MemoryStore()
    with portable_cache(store) as cache, torch.no_grad():
        cache.prefill(IDS)
        cache.flush()
    folder = FOLDER / transformers.__version__
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for key in store.keys():  # noqa: SIM118  # a store is no mapping
        (folder / f"{key}.chunk").write_bytes(store.read(key) or b"")


if __name__ == "__main__":
    main()
