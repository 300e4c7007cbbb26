"""The behaviour reference for `exact=False`: numbers computed by the model whose KV is stored, kept beside the chunks.

Without `exact`, bits cannot be compared, since other machines round differently. So the first process that saves under a
namespace also saves some numbers of its short forward (`model.behaviour`), as one small value; later processes compare theirs
with them. A model that differs by more than rounding gets its own namespace. It is impossible to tell which of the two models
is right; the stored numbers count, since the stored KV belongs to them.

The value has the format of a stored chunk, so it is bounded and checked like one. A malformed value is not used as a reference.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from cake_hf.chunks.aligned_memory import host_bytes
from cake_hf.chunks.codec import ChunkMetadata, checksums, encode_header
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.errors import CorruptChunk
from cake_hf.keys import behaviour_key
from cake_hf.model.behaviour import Kept
from cake_hf.model.kv_layout import differ
from cake_hf.model.plainly import ComputePlainly, no_answer
from cake_hf.stores.base import Store
from cake_hf.transfer.deadline import Late, ask
from cake_hf.transfer.single_reads import read_state
from cake_hf.util.forks import Lock

MOST_NUMBERS = 4096
"""Most numbers kept of one tensor, spread over all of it. Attention has no more; recurrent states can be 100 times as large."""

TOLERANCES = {torch.float64: 0.002, torch.float32: 0.002, torch.float16: 0.01}
TOLERANCE = 0.05
"""Relative differences, by the KV's dtype: twice the effect of rounding in a model of 64 layers (in float32 with TF32)."""

AGREED_SECONDS = 600.0
"""How long a store's answer is reused. Reading again counts as a use, so that the value is not evicted before the chunks."""


@dataclass(frozen=True)
class _Agreed:
    reference: Kept | None
    at: float


_agreed: weakref.WeakKeyDictionary[Store, dict[str, _Agreed]] = weakref.WeakKeyDictionary()
_first: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Kept]] = weakref.WeakKeyDictionary()
_lock = Lock()


@dataclass(frozen=True)
class ReferencePlace:
    """The place of a namespace's reference in a store.

    Attributes:
        store: the store with the chunks.
        namespace: digest.
        model: human-readable name.
        may_write: whether the store may be written to.
        seconds: the time limit of each request.
        reads, writes: requests that were not answered in time.
        clock: monotonic seconds.
    """

    store: Store
    namespace: str
    model: str
    may_write: bool
    seconds: float
    reads: Late
    writes: Late
    clock: Callable[[], float] = time.monotonic

    def reference(self, mine: Kept) -> Kept | None:
        """Returns the stored reference. If there is none, `mine` becomes it; None if `mine` cannot be written.

        Raises:
            ComputePlainly: the store does not answer.
        """
        with _lock:
            known = _agreed.setdefault(self.store, {}).get(self.namespace)
        if known is not None and self.clock() - known.at < AGREED_SECONDS:
            return known.reference
        reference, failed = self._agree(mine)
        if not failed:
            with _lock:
                _agreed.setdefault(self.store, {})[self.namespace] = _Agreed(reference, self.clock())
        return reference

    def _agree(self, mine: Kept) -> tuple[Kept | None, bool]:
        """Returns the reference, uncached, and whether a necessary write failed."""
        found, unusable = self._read(mine)
        if found is not None or not self.may_write:
            return found, False
        write = partial(_write, self.store, self.namespace, self.model, mine, replace=unusable)
        answer = ask(write, self.seconds, "behaviour", self.writes)
        if answer.error is not None:
            return None, True
        return (mine, False) if answer.value else (self._read(mine)[0], False)

    def _read(self, mine: Kept) -> tuple[Kept | None, bool]:
        answer = ask(partial(_read, self.store, self.namespace, mine), self.seconds, "lookup", self.reads)
        if answer.value is None:
            raise ComputePlainly(no_answer(answer.trouble))
        return answer.value


def computes_otherwise(
    model: torch.nn.Module, content: str, seen: Kept, reference_place: ReferencePlace | None
) -> bool:
    """Returns whether a model's results differ, by more than rounding, from those of the model whose KV is stored.

    Args:
        model: any model.
        content: digest of its config, weights and code: with a different digest it is another model.
        seen: its current results, from `behaviour`.
        reference_place: holds the reference; None if there is none. Without a reference the model is compared with its own
            first results in this process.

    Raises:
        ComputePlainly: the store does not answer.
    """
    mine = _some_numbers(seen)
    with _lock:
        first = _first.setdefault(model, {}).setdefault(content, mine)
    reference = None if reference_place is None or not _is_sound(first) else reference_place.reference(first)
    reference = first if reference is None else reference
    tolerance = max(TOLERANCES.get(tensor.dtype, TOLERANCE) for tensor in mine.values()) if mine else 0.0
    return reference.keys() != mine.keys() or any(
        reference[name].shape != mine[name].shape or differ(reference[name], mine[name], tolerance) for name in mine
    )


def _some_numbers(seen: Kept) -> Kept:
    """Returns at most `MOST_NUMBERS` of each tensor, flat."""
    flat = {name: tensor.detach().flatten() for name, tensor in seen.items() if tensor.numel()}
    return {name: tensor[:: -(-tensor.numel() // MOST_NUMBERS)].clone() for name, tensor in flat.items()}


def _is_sound(numbers: Kept) -> bool:
    return bool(numbers) and all(bool(torch.isfinite(tensor.float()).all()) for tensor in numbers.values())


def _layout(numbers: Kept) -> ChunkLayout:
    pieces = [Piece(name, 1, tensor.numel(), tensor.dtype) for name, tensor in numbers.items()]
    # The widest dtypes first, so that each piece is aligned to its own.
    return ChunkLayout(1, tuple(sorted(pieces, key=lambda piece: -piece.dtype.itemsize)))


def _read(store: Store, namespace: str, template: Kept) -> tuple[Kept | None, bool]:
    """Returns the stored numbers, and whether the stored value is unusable. Propagates the store's errors."""
    layout, key = _layout(template), behaviour_key(namespace)
    try:
        found = None if store.size(key) is None else read_state(store, key, layout)
    except CorruptChunk:
        return None, True
    if found is None:
        return None, False
    numbers = {piece.name: part for piece, part in zip(layout.pieces, found, strict=True)}
    return (numbers, False) if _is_sound(numbers) else (None, True)


def _write(store: Store, namespace: str, model: str, numbers: Kept, *, replace: bool) -> bool:
    """Writes the reference; returns False if another one already existed."""
    layout, key = _layout(numbers), behaviour_key(namespace)
    payload = b"".join(host_bytes(numbers[piece.name]) for piece in layout.pieces)
    metadata = ChunkMetadata(key, namespace, 0, namespace, model, checksums(payload, layout))
    return store.write(key, [encode_header(layout, metadata), payload], replace=replace)
