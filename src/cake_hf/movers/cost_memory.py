"""What computing and loading cost here, remembered from prompt to prompt and from process to process.

One learner per (store, namespace, device). Within a process it lives as long as the store object; a store that has room for
notes on this machine also keeps it in a small file there. Nothing depends on it but speed: whatever is wrong with the file,
it is ignored and written anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cake_hf.arithmetic.costs import CostLearner, Costs
from cake_hf.arithmetic.report import Span
from cake_hf.stores.base import Store

logger = logging.getLogger("cake_hf")

MAX_FILE_BYTES = 2**20

_learners: weakref.WeakKeyDictionary[Store, dict[str, CostMemory]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class CostMemory:
    """A learner, its lock and its file. Get it from `recall_costs`."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._learner = _read(file) or CostLearner()

    def costs(self, chunk_bytes: int) -> Costs:
        """The present estimate for chunks of that size; its halves are None until something was measured."""
        with self._lock:
            return self._learner.costs(chunk_bytes)

    def learn(self, timeline: Sequence[Span], first: int, chunk_bytes: int, last_piece: int | None = None) -> None:
        """Take in what one restore measured.

        Args:
            timeline: of its report.
            first: index on the absolute grid of the restore's chunk 0.
            chunk_bytes: of one chunk.
            last_piece: index on the absolute grid of the prompt's last piece, if it is a part of a chunk.
        """
        with self._lock:
            for span in timeline:
                if span.outcome == "computed" and span.chunk >= 0:
                    self._learner.saw_compute(first + span.chunk, span.end - span.start)
                elif span.outcome == "computed" and last_piece is not None:
                    self._learner.saw_part(last_piece, span.end - span.start)
            loads = [(span.start, span.end) for span in timeline if span.outcome == "loaded"]
            if loads:
                self._learner.saw_loads(chunk_bytes, loads)
            self._learner.costs(chunk_bytes)  # the fit is made now, not while the next prompt waits for it
            text = self._learner.to_json()
        if self._file is not None:
            _write(self._file, text)


def recall_costs(store: Store, namespace: str, device: str) -> CostMemory:
    """The memory for a store, a namespace and a device, from this process, from its file, or new.

    Args:
        store: where chunks are read from.
        namespace: digest.
        device: that computes, e.g. "cuda:0".
    """
    name = hashlib.blake2b(f"{namespace} {device}".encode(), digest_size=8).hexdigest()
    with _lock:
        known = _learners.setdefault(store, {})
        if name not in known:
            folder = store.notes_folder()
            known[name] = CostMemory(None if folder is None else folder / f"costs-{name}.json")
        return known[name]


def _read(file: Path | None) -> CostLearner | None:
    if file is None:
        return None
    try:
        with open(file, encoding="utf-8") as stream:
            return CostLearner.from_json(stream.read(MAX_FILE_BYTES))
    except (OSError, UnicodeDecodeError):
        return None


def _write(file: Path, text: str) -> None:
    """Replace the file as a whole. Where that is not possible (a read-only store), nothing is remembered."""
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        logger.debug("Costs are not remembered in %s: %s", file, error)
        with suppress(OSError):
            partial.unlink()
