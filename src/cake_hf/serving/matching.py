"""Looks up which chunks of an engine's requests are stored, see `Desk`; and probes whether the engine may use those at all.

The probe: if a chunk that runs alone in a step gives KV bit for bit as `generate` does, the engine and `generate` use each
other's chunks. If not (padded shapes, compiled steps, other kernels), what of the engine may change how KV rounds becomes part
of its namespace, and its chunks are its own.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from cake_hf.chunks.codec import stored_bytes
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.keys import canonical, chunk_keys, namespace_digest
from cake_hf.model.kv_layout import run_aside, some_tokens
from cake_hf.model.look import one_look
from cake_hf.model.plainly import ComputePlainly
from cake_hf.report import Refusal
from cake_hf.restore.audit import audit_refusal
from cake_hf.restore.misses import NONE_YET
from cake_hf.restore.prompt import stored_mask
from cake_hf.restore.session import Session
from cake_hf.serving.beliefs import Beliefs
from cake_hf.serving.requests import give_up
from cake_hf.serving.restore import Phase, Restore
from cake_hf.serving.seams import Engine, RequestState
from cake_hf.serving.support import prompts_refusal

logger = logging.getLogger("cake_hf")


class Matching:
    """The prefix match of an engine's requests.

    Attributes:
        refusal: why nothing is restored; None if it is.
        apart: metadata of the engine that is part of the namespace; empty if it computes as `generate` does.
    """

    def __init__(self, session: Session, layers: list[Any], beliefs: Beliefs) -> None:
        self._session, self._layers, self._beliefs = session, layers, beliefs
        self.refusal: Refusal | None = None
        self.apart: dict[str, Any] = {}

    def look_up(self, restores: list[Restore]) -> None:
        """Finds out what is stored of the prompts of some requests, which are then waiting for memory."""
        try:
            refusal = self.refusal or self._look_up(restores)
        except ComputePlainly as because:
            refusal = because.refusal
        except Exception as error:
            logger.warning("A prompt cannot be looked up and is computed plainly. %s", error)
            refusal = Refusal("lookup-failed", f"the prompt could not be looked up: {error}")
        for restore in restores:
            if restore.phase is Phase.LOOKING:
                if refusal:
                    give_up(restore, refusal)
                else:
                    restore.found()

    def _look_up(self, restores: list[Restore]) -> Refusal | None:
        session = self._session
        with torch.no_grad(), one_look():
            plain = session.bound_model.namespace(torch.tensor([restores[0].tokens]))
            if refusal := prompts_refusal(session, self._layers, plain, max(len(one.tokens) for one in restores)):
                return refusal
        namespace = self._apart(plain)
        if refusal := audit_refusal(session.model, namespace):
            return refusal
        for restore in restores:
            whole = restore.tokens[: restore.chunks * session.chunk_size]
            restore.keys, restore.namespace = chunk_keys(namespace, whole, session.chunk_size), namespace
        stored, absence = stored_mask(session, [key for restore in restores for key in restore.keys])
        at = 0
        for restore in restores:
            restore.stored = stored[at : at + restore.chunks]
            at += restore.chunks
            restore.saves = session.bound_store.saves
            report, missing = restore.report, restore.chunks - sum(restore.stored)
            report.store, report.chunks_missed = session.bound_store.name, report.chunks_missed + missing
            report.bytes_stored += sum(restore.stored) * stored_bytes(session.bound_model.layout())
            report.explain(absence or (NONE_YET if missing == restore.chunks else None))
        if session.exact and any(stored):
            session.bound_model.vouched_for = plain
        self._beliefs.start_from(session.cost_memory(namespace).costs())
        return None

    def _apart(self, namespace: str) -> str:
        if not self.apart:
            return namespace
        return namespace_digest(canonical({"namespace": namespace, "engine": self.apart}))


logger = logging.getLogger("cake_hf")

PROBE = "cake_hf probe"
CHUNKS = 2
"""At least. The second chunk attends to KV that is read back from the engine's memory, the first one does not."""

_verdicts: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


def computes_as_generate(model: Any, engine: Engine, layout: ChunkLayout) -> bool:
    """Returns whether the engine's KV is that of `generate`, bit for bit. Runs a few chunks, once per model and engine.

    Args:
        model: the model of the engine.
        engine: before its first step.
    """
    about = canonical(
        {**engine.metadata(), "attention": str(model.config._attn_implementation), "layout": layout.tensor_table}
    )
    known = _verdicts.setdefault(model, {})
    if about not in known:
        try:
            known[about] = _are_equal(model, engine, layout)
        except Exception as error:
            logger.debug("Whether the engine computes as generate does is not known: %s", error)
            return False
    return known[about]


def _are_equal(model: Any, engine: Engine, layout: ChunkLayout) -> bool:
    size = layout.chunk_size
    chunks = _chunks(engine, size)
    ids = some_tokens(model, chunks * size, 7919)
    state = RequestState(request_id=PROBE, initial_tokens=[*ids[0].tolist(), 0])
    windows = []
    try:
        for _ in range(chunks):
            engine.see_windows(on=True)
            engine.run_alone(model, state, size)
            windows.append(engine.seen_windows(size) or ())
        blocks = engine.parts(PROBE, 0, chunks * size, layout.everywhere)
        made = [torch.cat([block[piece] for block in blocks]) for piece in range(layout.everywhere)]
        made += [torch.cat(seen) for seen in zip(*windows, strict=True)]
    finally:
        engine.see_windows(on=False)
        engine.free(PROBE)
    with one_look():
        _, layers = run_aside(model, list(ids.split(size, dim=1)))
    expected = [_kept(layers[piece.layer], piece) for piece in layout.pieces]
    return all(
        torch.equal(mine.reshape(-1).view(torch.uint8)[-its.numel() :], its)
        for mine, its in zip(made, expected, strict=True)
    )


def _chunks(engine: Engine, size: int) -> int:
    """Returns how many chunks are run: until the first one has left a window, if there is room for that."""
    wanted = max(CHUNKS, 1 - (-engine.window // size))
    return wanted if engine.room is None else max(CHUNKS, min(wanted, engine.room // size))


def _kept(layer: Any, piece: Piece) -> torch.Tensor:
    """Returns the bytes that `generate` keeps of a piece; of a window, the last tokens'."""
    kept: torch.Tensor = getattr(layer, piece.name.rpartition(".")[2])
    return kept[0].transpose(0, 1).contiguous().view(torch.uint8).reshape(-1)
