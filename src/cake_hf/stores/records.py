"""What the chunks of a namespace were made with, kept as a note in the store: so that who finds nothing can be told why.

A key is a digest over the namespace and the tokens. So from a record, which has the namespace and the facts that it is a digest
of, the keys that a prompt has there can be told, and the store can be asked for them. Nothing about documents is kept but their
first words, where that is asked for.

A namespace also covers a salt, which is in no record. Whoever does not have it cannot make the namespace from the facts, and so
learns nothing from it about what is stored.

A record is read as if a stranger had written it: what makes no sense is no record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cake_hf.keys import namespace_digest
from cake_hf.limits import MIN_CHUNK_SIZE
from cake_hf.stores.base import MAX_NOTE_BYTES, Store
from cake_hf.util.canonical import canonical
from cake_hf.util.redaction import shown

FORMAT = "cake_hf namespace"
VERSION = 1

MOST_RECORDS = 32
"""In one store: those that were written to last."""

MOST_WORDS = 200
"""Documents of a namespace whose first words are kept."""

MAX_TEXT = 200
MAX_CHUNK_SIZE = 2**24
MAX_DATE = 10**11

_KEY = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Record:
    """What the chunks of one namespace were made with.

    Attributes:
        namespace: digest.
        facts: that it is a digest of, with a salt.
        model: its name, for people.
        first, last: when the first chunk was saved, and the last one, to the day; seconds since the epoch.
        words: by the key of a document's last chunk, its first words; only of those for which this was asked for.
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
        """Whether it serves only the very same numerics."""
        return "numerics" in self.facts

    def is_of(self, salt: str) -> bool:
        """Whether that is the salt that the chunks were saved under."""
        return namespace_digest(canonical({**self.facts, "salt": salt})) == self.namespace

    def encode(self) -> bytes:
        """As it is kept."""
        return canonical({"format": FORMAT, "version": VERSION, **asdict(self)}).encode()

    @classmethod
    def parse(cls, raw: bytes) -> Record | None:
        """What was kept; None if it is no record."""
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
    """What a store has of them, newest first. Asks the store, so this may hang.

    Raises:
        Exception: whatever the store raises.
    """
    parsed = ((name, Record.parse(raw)) for name, raw in store.notes().items())
    found = [one for name, one in parsed if one is not None and one.namespace == name]
    return sorted(found, key=lambda record: -record.last)[:MOST_RECORDS]


def keep(store: Store, record: Record) -> None:
    """Write a record down, with what an older one of its namespace says besides, and drop those that are too many.

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
