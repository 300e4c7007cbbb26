"""Looks up which chunks of an engine's requests are stored; see `Desk`."""

from __future__ import annotations

import logging
from typing import Any

import torch

from cake_hf.chunks.codec import stored_bytes
from cake_hf.keys import canonical, chunk_keys, namespace_digest
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
