"""Explains why nothing of a prompt was found: whether the store has it under another namespace, and what would have to match.

The store is asked while the prompt is computed, in a thread of its own, and only after a miss: a hit costs nothing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cake_hf.blocks import Block, blocks
from cake_hf.keys import block_keys, canonical
from cake_hf.model.plainly import no_answer
from cake_hf.report import Refusal
from cake_hf.restore.request import ForwardCall
from cake_hf.restore.session import Session
from cake_hf.restore.support import tell_once
from cake_hf.stores.base import Store
from cake_hf.stores.differences import Difference, between, in_a_sentence, severity
from cake_hf.stores.records import Record, records
from cake_hf.transfer.deadline import Question, ask

logger = logging.getLogger("cake_hf")

NONE_YET = Refusal("none-stored", "the store has none of the prompt's chunks yet")
OTHER_SALT = Refusal(
    "other-salt",
    "the store has none of the prompt's chunks yet; what it has of this model under another salt, or under none, is not "
    "looked into: pass the salt that it was saved with",
)

FEW_KEYS = 32
"""The most keys of a namespace that are asked for at once; a bucket takes a request for each."""

ExtraHashes = Callable[[Sequence[Block]], Sequence[bytes]]


@dataclass(frozen=True)
class MissedPrompt:
    """A prompt that was not found, and the session that looked for it.

    Attributes:
        namespace: digest, of the session.
        metadata: the metadata that the namespace is a digest of, without the salt.
        model: its name.
        tokens: of the prompt, 64-bit integers.
        extra_hashes: returns the extra hashes of blocks, see `ForwardCall.extra_hashes`.
        cuts: the declared ones.
    """

    namespace: str
    metadata: dict[str, Any]
    salt: str
    model: str
    tokens: memoryview
    extra_hashes: ExtraHashes
    cuts: Sequence[int] = ()

    def keys(self, record: Record) -> list[str]:
        """Returns the keys of the prompt's chunks, and of the tails between them, under another namespace.

        A last block that fills no chunk is included only if it is the whole prompt and its end is a declared cut.
        """
        named = blocks(0, len(self.tokens), self.cuts, record.chunk_size)
        last = named[-1] if named else None
        if last and not last.fills(record.chunk_size) and (len(named) > 1 or last.end not in self.cuts):
            named.pop()
        return block_keys(
            record.namespace, self.tokens, named, record.chunk_size, extra_hashes=self.extra_hashes(named)
        )


@dataclass(frozen=True)
class StoredElsewhere:
    """Chunks of a prompt that are stored under another namespace.

    Attributes:
        differences: between that namespace and the session's own.
        keys: the keys of the prompt's chunks there, see `MissedPrompt.keys`.
        stored: how many of these are stored.
    """

    record: Record
    differences: list[Difference]
    keys: list[str]
    stored: int

    def __str__(self) -> str:
        told = in_a_sentence(self.differences)
        if self.stored == 1:
            return f"1 chunk of this prompt is stored, {told}"
        return f"{self.stored} chunks of this prompt are stored, {told}"


class Inquiry:
    """The question why a prompt of a session was not found, asked in the background.

    Args:
        call: the forward with the whole prompt.
        seconds: that the answer may take from now on.
        cuts: the declared ones.
    """

    def __init__(
        self, session: Session, call: ForwardCall, namespace: str, seconds: float, cuts: Sequence[int] = ()
    ) -> None:
        self._end = time.monotonic() + seconds
        tokens = call.ids[0].to("cpu", torch.int64, copy=True).contiguous().numpy().data
        metadata, model = session.bound_model.latest_metadata(), session.bound_model.name
        # Does not hold the session: the thread that asks may hang.
        missed = MissedPrompt(namespace, metadata, session.salt, model, tokens, extra_hashes_of(call), cuts)
        self._question = Question(
            partial(explanation, session.bound_store.store, missed), "notes", session.bound_store.sharing.notes
        )

    def answer(self) -> Refusal | None:
        """Returns why nothing of the prompt was found; None if the store has nothing to say about it, or does not answer."""
        answer = self._question.answer(max(0.0, self._end - time.monotonic()))
        if answer.error is not None:
            logger.debug("Why a prompt was not found is not known: %s", answer.trouble)
        return answer.value

    def give_up(self) -> None:
        """Drops the question, since the prompt was abandoned."""
        self._question.give_up()


def extra_hashes_of(call: ForwardCall) -> ExtraHashes:
    """Returns the function that gives a prompt's extra hashes for any blocks, without holding the call's cache."""
    vision = call.vision
    return (lambda named: []) if vision is None else vision.extra_hashes


def tell_missing(refusal: Refusal) -> None:
    """Logs, once per kind of reason, why a prompt was not found."""
    kind = "".join(letter for letter in refusal.text if not letter.isdigit())
    tell_once(kind, f"A prompt is not found: {refusal.text}", logging.INFO)


def explanation(store: Store, missed: MissedPrompt) -> Refusal | None:
    """Returns why a prompt was not found; None if the store has nothing of it. May hang if the store hangs.

    Raises:
        Exception: any error that the store raises, or that absurd records lead to.
    """
    known = records(store)
    likely = found_elsewhere(store, missed, known, all_chunks=False)
    if likely:
        return Refusal("stored-otherwise", str(_counted(store, likely[0])))
    others = (record for record in known if not record.is_of(missed.salt))
    same_weights = any(_weights(record.facts) == _weights(missed.metadata) for record in others)
    return OTHER_SALT if same_weights else None


def found_elsewhere(
    store: Store, missed: MissedPrompt, known: Sequence[Record], *, all_chunks: bool
) -> list[StoredElsewhere]:
    """Returns the other namespaces that a prompt is stored under, nearest first. Those with another salt are skipped.

    Args:
        store: to be asked.
        known: records of the store.
        all_chunks: ask for each chunk; if False, only for some, which costs less, and `stored` is not a full count.
    """
    ours = json.loads(canonical(missed.metadata))
    others = [record for record in known if record.namespace != missed.namespace and record.is_of(missed.salt)]
    asked = {
        record.namespace: keys if all_chunks else _sample(keys) for record in others if (keys := missed.keys(record))
    }
    wanted = [key for keys in asked.values() for key in keys]
    has = dict(zip(wanted, store.contains(wanted), strict=True)) if wanted else {}
    found = [
        StoredElsewhere(
            record,
            between(record.facts, ours, record.model, missed.model),
            missed.keys(record),
            sum(bool(has[key]) for key in asked.get(record.namespace, ())),
        )
        for record in others
        if any(has[key] for key in asked.get(record.namespace, ()))
    ]
    return sorted(found, key=lambda elsewhere: (severity(elsewhere.differences), -elsewhere.stored))


def _weights(metadata: Mapping[str, Any]) -> Any:
    model = metadata.get("model")
    return model.get("weights") if isinstance(model, Mapping) else None


def _counted(store: Store, elsewhere: StoredElsewhere) -> StoredElsewhere:
    """Returns the same result, counted over all of its chunks."""
    stored = sum(map(bool, store.contains(elsewhere.keys)))
    return StoredElsewhere(elsewhere.record, elsewhere.differences, elsewhere.keys, max(1, stored))


def _sample(keys: list[str]) -> list[str]:
    """Returns the first key, the last, and some in between if there are many: eviction may have started at either end."""
    if len(keys) <= FEW_KEYS:
        return keys
    places = {0, len(keys) - 1} | {2**n - 1 for n in range(1, len(keys).bit_length())}
    return [keys[place] for place in sorted(places) if place < len(keys)]


def mismatch(session: Session, namespace: str) -> Refusal | None:
    """Returns why the store's KV cannot serve this model, if the store can tell."""
    store, sharing = session.bound_store.store, session.bound_store.sharing
    if type(store).mismatch_reason is Store.mismatch_reason:
        return None
    # Read here: the asking thread may hang, and must not hold the session.
    metadata = session.bound_model.latest_metadata()
    answer = ask(
        partial(_mismatch_reason_of, store, namespace, metadata),
        session.limits.lookup_timeout,
        "mismatch_reason",
        sharing.lookups,
    )
    if answer.error is not None:
        return no_answer(answer.trouble)
    return Refusal("store-mismatch", answer.value) if answer.value else None


def why_none(session: Session) -> Refusal:
    """Returns why nothing of a prompt is stored, as far as the model tells; `NONE_YET` if it does not."""
    if session.bound_model.doubt is not None:
        return session.bound_model.doubt
    if session.exact or "behaviour" not in session.bound_model.latest_metadata():
        return NONE_YET
    refusal = Refusal(
        "edited-model",
        "this model computes something else than the one whose KV the store holds for the same weights, so it has keys of its "
        "own, and the store has none of the prompt's chunks under these yet",
    )
    tell_once(f"{type(session.model).__name__} apart", refusal.text[0].upper() + refusal.text[1:])
    return refusal


def _mismatch_reason_of(store: Store, namespace: str, metadata: dict[str, Any]) -> str:
    mismatch_reason = store.mismatch_reason(namespace, lambda: metadata)
    return mismatch_reason if isinstance(mismatch_reason, str) else ""
