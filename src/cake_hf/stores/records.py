"""Records of what a namespace's chunks were made with, kept as notes in the store, to explain misses to users.

A key is a digest over the namespace and the tokens. A record has the namespace and the metadata that it is a digest of, so the
keys of a prompt under that namespace can be computed and looked up in the store. Of documents, only the first words are kept,
and only on request.

A namespace also covers a salt, which no record contains. Without the salt the namespace cannot be computed from the metadata,
so a record reveals nothing about the stored prompts.

Records are untrusted: an implausible one is ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cake_hf.keys import canonical, namespace_digest
from cake_hf.limits import MIN_CHUNK_SIZE
from cake_hf.stores.base import MAX_NOTE_BYTES, Store
from cake_hf.util.redaction import shown

FORMAT = "cake_hf namespace"
VERSION = 1

MOST_RECORDS = 32
"""Most records per store; those updated last are kept."""

MOST_WORDS = 200
"""Most documents per namespace whose first words are kept."""

MAX_TEXT = 200
MAX_CHUNK_SIZE = 2**24
MAX_DATE = 10**11

_KEY = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Record:
    """A record of what the chunks of one namespace were made with.

    Attributes:
        namespace: the namespace's digest.
        facts: the metadata that, together with a salt, the namespace is a digest of.
        model: the model's name, for people.
        first, last: when the first and the last chunk were saved, to the day; seconds since the epoch.
        words: a document's first words, by the key of its last chunk; only for documents for which this was requested.
    """

    namespace: str
    facts: dict[str, Any]
    model: str
    first: int
    last: int
    words: dict[str, str] = field(default_factory=dict)

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk."""
        return int(self.facts["chunk_size"])

    @property
    def exact(self) -> bool:
        """Whether the chunks serve only identical numerics."""
        return "numerics" in self.facts

    def is_of(self, salt: str) -> bool:
        """Returns whether the chunks were saved under this salt."""
        return namespace_digest(canonical({**self.facts, "salt": salt})) == self.namespace

    def encode(self) -> bytes:
        """Returns the record as it is stored."""
        return canonical({"format": FORMAT, "version": VERSION, **asdict(self)}).encode()

    @classmethod
    def parse(cls, raw: bytes) -> Record | None:
        """Parses a stored record; returns None if it is not one."""
        if len(raw) > MAX_NOTE_BYTES:
            return None
        try:
            told = json.loads(raw)
            return cls._checked(told) if told["format"] == FORMAT and told["version"] == VERSION else None
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None

    @classmethod
    def _checked(cls, told: Mapping[str, Any]) -> Record | None:
        facts, words, namespace = told["facts"], told["words"], told["namespace"]
        size, dates = facts["chunk_size"], (told["first"], told["last"])
        makes_sense = (
            _KEY.fullmatch(namespace)
            and type(size) is int
            and MIN_CHUNK_SIZE <= size <= MAX_CHUNK_SIZE
            and all(type(date) is int and 0 <= date < MAX_DATE for date in dates)
        )
        if not makes_sense:
            return None
        kept = {key: _text(text) for key, text in list(words.items())[-MOST_WORDS:] if _KEY.fullmatch(key)}
        return cls(namespace, facts, _text(told["model"]), *dates, kept)


def records(store: Store) -> list[Record]:
    """Returns a store's records, newest first. Asks the store, so this may hang.

    Raises:
        Exception: whatever the store raises.
    """
    parsed = ((name, Record.parse(raw)) for name, raw in store.notes().items())
    found = [one for name, one in parsed if one is not None and one.namespace == name]
    return sorted(found, key=lambda record: -record.last)[:MOST_RECORDS]


def keep(store: Store, record: Record) -> None:
    """Writes a record, merged with an older one of its namespace, and drops the oldest records beyond the limit.

    A record that is too large is not kept.

    Raises:
        Exception: whatever the store raises.
    """
    notes = store.notes()
    known = {name: Record.parse(raw) for name, raw in notes.items()}
    before = known.get(record.namespace)
    if before is not None and before.namespace == record.namespace:
        words = dict(list({**before.words, **record.words}.items())[-MOST_WORDS:])
        record = replace(record, first=min(before.first, record.first), words=words)
    raw = record.encode()
    if len(raw) > MAX_NOTE_BYTES or Record.parse(raw) is None:
        return
    store.put_note(record.namespace, raw)
    others = [name for name in known if name != record.namespace]
    oldest_first = sorted(others, key=lambda name: one.last if (one := known[name]) else -1)
    for name in oldest_first[: max(0, len(others) + 1 - MOST_RECORDS)]:
        store.put_note(name, None)


def _text(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError("this is no text")
    return shown(text[:MAX_TEXT])
