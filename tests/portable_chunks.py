"""Chunks written with exact=False on one version of transformers, kept with the tests so that all others can read them.

    PYTHONPATH=src:tests python tests/portable_chunks.py

writes them anew, with the installed version. That is needed only after a change of the format at rest.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from cake_hf import CakeCache, MemoryStore
from models import CHUNK, build, prompt

FOLDER = Path(__file__).parent / "data" / "portable"
IDS = prompt(2 * CHUNK + 5)


def portable_cache(store: MemoryStore, **options: str) -> CakeCache:
    """A cache on the model that these chunks are of."""
    return CakeCache(build("llama"), store, chunk_size=CHUNK, exact=False, **options)


def kept_chunks() -> MemoryStore:
    """A store with the kept chunks."""
    store = MemoryStore()
    for path in FOLDER.glob("*.chunk"):
        store.write(path.stem, [path.read_bytes()])
    return store


def written_with() -> str:
    """The version of transformers that wrote them."""
    return (FOLDER / "transformers.txt").read_text(encoding="utf-8").strip()


def main() -> None:
    store = MemoryStore()
    with portable_cache(store) as cache, torch.no_grad():
        cache.prefill(IDS)
        cache.flush()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.chunk"):
        path.unlink()
    for key in store.keys():  # noqa: SIM118  # a store is no mapping
        (FOLDER / f"{key}.chunk").write_bytes(store.read(key) or b"")
    (FOLDER / "transformers.txt").write_text(f"{transformers.__version__}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
