"""A pack's manifest is read as if an enemy had written it."""

from __future__ import annotations

import json
import os
import random
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from blake3 import blake3

from cake_hf import StoreError
from cake_hf.keys import state_key
from cake_hf.stores.manifest import (
    BLOCK_BYTES,
    MAX_MANIFEST_BYTES,
    PackChunk,
    PackManifest,
    chunk_path,
    parse_manifest,
    printable,
)
from cake_hf.stores.pack import PackSource, PackStore
from cake_hf.testing.contract import key_of, value_of
from pack_files import FACTS, entry_of, manifest_of

FUZZ = int(os.environ.get("CAKE_HF_FUZZ", "2000"))
"""Mutations of a manifest; a long run takes 100,000."""

CONTENT = {key_of(1): value_of(1), key_of(2): value_of(2, BLOCK_BYTES + 10)}

STATES = tuple(
    entry_of(state_key(key), index, value_of(10 + index, len(value)))
    for index, (key, value) in enumerate(CONTENT.items())
)
"""Snapshots at the ends of both chunks."""


def changed(change: Callable[[dict[str, Any]], object], **more: Any) -> bytes:
    fields = json.loads(manifest_of(CONTENT, **more).to_json())
    change(fields)
    return json.dumps(fields).encode()


def test_the_manifests_of_the_tests_are_good() -> None:
    """So that what follows fails for what was changed."""
    assert parse_manifest(changed(lambda fields: None)) == manifest_of(CONTENT)
    for states in (STATES, STATES[:1], STATES[1:]):
        assert parse_manifest(changed(lambda fields: None, states=states)) == manifest_of(CONTENT, states=states)


def test_a_manifest_without_snapshots_is_written_as_it_always_was() -> None:
    """Before there were snapshots in packs, these very bytes had this digest."""
    digest = blake3(manifest_of(CONTENT).to_json()).hexdigest()
    assert digest == "e2156ebec8a3bf65f857c98ffa2af495a562fb1234fef0e712394c9632e91d1d"


def test_snapshots_are_files_as_chunks_are() -> None:
    manifest = manifest_of(CONTENT, states=STATES)
    assert list(manifest.by_key) == [*CONTENT, *map(state_key, CONTENT)]
    assert manifest.nbytes == 2 * sum(map(len, CONTENT.values()))
    assert manifest.tokens == (0, 32)


def wrong_files(what: str) -> dict[str, Callable[[dict[str, Any]], object]]:
    """What no list of files may say, be they "chunks" or "states"."""
    return {
        "a path as a key": lambda m: m[what][0].update(key="../../etc/passwd"),
        "a path in a key": lambda m: m[what][0].update(key="../" + "a" * 37),
        "one key twice": lambda m: m[what][1].update(key=m[what][0]["key"]),
        "one place twice": lambda m: m[what][1].update(index=0),
        "a negative place": lambda m: m[what][0].update(index=-1),
        "a negative size": lambda m: m[what][0].update(size=-1),
        "a size of nothing": lambda m: m[what][0].update(size=0, blocks=[]),
        "a huge size": lambda m: m[what][0].update(size=2**40),
        "a size that is a float": lambda m: m[what][0].update(size=1000.0),
        "a size that is a text": lambda m: m[what][0].update(size="1000"),
        "a size that is true": lambda m: m[what][0].update(size=True),
        "a digest too short": lambda m: m[what][0].update(blake3="ab"),
        "no digest": lambda m: m[what][0].pop("blake3"),
        "blocks missing": lambda m: m[what][1]["blocks"].pop(),
        "blocks too many": lambda m: m[what][0]["blocks"].append("a" * 64),
        "a block that is a number": lambda m: m[what][0].update(blocks=[5]),
    }


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    **wrong_files("chunks"),
    "another format": lambda m: m.update(format="zip"),
    "another version": lambda m: m.update(version="3"),
    "a version that is a list": lambda m: m.update(version=["1"]),
    "the version with states, without": lambda m: m.update(version="2"),
    "the version with states, with an empty list": lambda m: m.update(version="2", states=[]),
    "states in the version without": lambda m: m.update(states=m["chunks"][:1]),
    "no version": lambda m: m.pop("version"),
    "a field more": lambda m: m.update(script="run me"),
    "a field less": lambda m: m.pop("dtype"),
    "a key in capitals": lambda m: m["chunks"][0].update(key="A" * 40),
    "a key with an end of line": lambda m: m["chunks"][0].update(key="a" * 40 + "\n"),
    "out of order": lambda m: m["chunks"].reverse(),
    "no chunks": lambda m: m.update(chunks=[]),
    "chunks as an object": lambda m: m.update(chunks={"0": m["chunks"][0]}),
    "a chunk as a number": lambda m: m["chunks"].append(7),
    "more in a chunk": lambda m: m["chunks"][0].update(url="http://elsewhere"),
    "tokens that do not fit": lambda m: m.update(tokens=[0, 99]),
    "tokens that are none": lambda m: m.update(tokens=5),
    "a chunk size that does not fit": lambda m: m.update(chunk_size=32, tokens=[0, 64]),
    "a chunk size of one": lambda m: m.update(chunk_size=1),
    "facts of another namespace": lambda m: m["facts"].update(model={"class": "Large"}),
    "facts with a salt": lambda m: m["facts"].update(salt="s"),
    "facts that are none": lambda m: m.update(facts=[]),
    "facts without an end": lambda m: m["facts"].update(deep=deep(50)),
    "another namespace": lambda m: m.update(namespace="a" * 40),
    "a namespace in capitals": lambda m: m.update(namespace="A" * 40),
    "a flag that is a number": lambda m: m.update(salted=0),
    "a name with a control character": lambda m: m.update(model="\x1b[2J"),
    "a name without end": lambda m: m.update(model="x" * 1000),
    "a dtype with a path": lambda m: m.update(dtype="../F32"),
    "a revision that is none": lambda m: m.update(model_revision="main"),
}

WRONG_STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    **wrong_files("states"),
    "states in the version without": lambda m: m.update(version="1"),
    "no states": lambda m: m.pop("states"),
    "an empty list of states": lambda m: m.update(states=[]),
    "states as an object": lambda m: m.update(states={"0": m["states"][0]}),
    "states as nothing": lambda m: m.update(states=None),
    "a state as a number": lambda m: m["states"].__setitem__(1, 7),
    "more states than chunks": lambda m: m["states"].append(m["states"][1]),
    "a key in capitals": lambda m: m["states"][0].update(key=m["states"][0]["key"].upper()),
    "a key with an end of line": lambda m: m["states"][0].update(key=m["states"][0]["key"] + "\n"),
    "one state twice": lambda m: m["states"].__setitem__(1, m["states"][0]),
    "out of order": lambda m: m["states"].reverse(),
    "a chunk among the states": lambda m: m["states"].__setitem__(0, m["chunks"][0]),
    "a state among the chunks": lambda m: m["chunks"][1].update(key=m["states"][0]["key"]),
    "any other key": lambda m: m["states"][0].update(key="a" * 40),
    "another chunk's state": lambda m: m.update(states=[{**m["states"][1], "index": 0}]),
    "of a chunk that is not there": lambda m: m["states"][1].update(index=2),
    "of a chunk that was taken out": lambda m: m.update(chunks=m["chunks"][:1], tokens=[0, 16], states=m["states"][1:]),
    "a place that is false": lambda m: m["states"][0].update(index=False),
    "more in a state": lambda m: m["states"][0].update(url="http://elsewhere"),
}


@pytest.mark.parametrize(
    ("change", "more"),
    [
        *(pytest.param(change, {}, id=name) for name, change in WRONG.items()),
        *(pytest.param(change, {"states": STATES}, id=f"states: {name}") for name, change in WRONG_STATES.items()),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_sentence(
    change: Callable[[dict[str, Any]], object], more: dict[str, Any]
) -> None:
    with pytest.raises(StoreError) as caught:
        parse_manifest(changed(change, **more))
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 400


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"format":' * 5000,
        b'{"format": "cake_hf-pack", "format": "cake_hf-pack"}',
        b'{"format": "cake_hf-pack", "version": ' + b"9" * 5000 + b"}",
        b"PK\x03\x04",
        b"\x80\x04\x95",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(StoreError):
        parse_manifest(raw)


@pytest.mark.parametrize(
    "flood",
    [
        b"[" + b"{}," * (MAX_MANIFEST_BYTES // 3),
        b"[" + b"[]," * (MAX_MANIFEST_BYTES // 3 - 9) + b"[]]",
        b"[" + b"0," * (MAX_MANIFEST_BYTES // 2 - 9) + b"0]",
        b"[" + b'{"a":1},' * 350_000 + b"{}]",
        b'{"format": "' + b"x" * (MAX_MANIFEST_BYTES - 99) + b'"}',
        b'{"format": "\\ud83d\\ude00' + b"x" * (MAX_MANIFEST_BYTES - 99) + b'"}',
        b"x" * (MAX_MANIFEST_BYTES + 1),
    ],
    ids=["objects", "lists", "numbers", "as many objects as may be", "one text", "one wide text", "too long"],
)
def test_a_flood_is_bounded_in_memory(flood: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(StoreError):
            parse_manifest(flood)
        assert tracemalloc.get_traced_memory()[1] <= 6.5 * MAX_MANIFEST_BYTES
    finally:
        tracemalloc.stop()


def test_mutated_manifests_give_typed_errors_only() -> None:
    """Each mutation is refused with a StoreError, or is a manifest that a pack can be asked about."""
    generator = random.Random(5)
    good = [
        manifest.to_json()
        for manifest in (
            manifest_of(CONTENT),
            manifest_of(CONTENT, salted=True),
            manifest_of(CONTENT, states=STATES),
            manifest_of(CONTENT, states=STATES[1:], salted=True),
        )
    ]
    refused = 0
    tracemalloc.start()
    try:
        for number in range(FUZZ):
            pack = opened_or_refused(mutated(good[number % len(good)], generator))
            if pack is None:
                refused += 1
                continue
            assert pack.contains([*pack.keys(), "?"]) == [True] * len(files(pack.manifest)) + [False]
            assert all(re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{40}\.safetensors", chunk_path(key)) for key in pack.keys())  # noqa: SIM118
            assert pack.mismatch_reason("0" * 40, lambda: FACTS).isprintable()
            for file in files(pack.manifest):
                with pytest.raises(StoreError):  # its digest is not that of the zeros which are read
                    pack.read_into(file.key, [memoryview(bytearray(1000))])
        assert tracemalloc.get_traced_memory()[1] <= 2 * MAX_MANIFEST_BYTES
    finally:
        tracemalloc.stop()
    assert refused > FUZZ // 2


def files(manifest: PackManifest) -> list[PackChunk]:
    return [*manifest.chunks, *manifest.states]


def opened_or_refused(raw: bytes) -> PackStore | None:
    try:
        return PackStore(Fixed(raw))
    except StoreError:
        return None


class Fixed(PackSource):
    """A source whose manifest is given and whose files are zeros."""

    range_seconds = 0.0

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def __str__(self) -> str:
        return "fixed"

    def manifest(self, most: int) -> bytes:
        return self._raw[: most + 1]

    def fetch(self, path: str, parts: Any, offset: int) -> None:
        pass


def mutated(good: bytes, generator: random.Random) -> bytes:
    """A manifest with a few bytes wrong, or with something else in the place of a value."""
    if generator.random() < 0.5:
        raw = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(raw) or 1)
            kind = generator.randrange(4)
            if kind == 0:
                raw[at : at + 1] = bytes([generator.randrange(256)])
            elif kind == 1:
                raw[at:at] = generator.randbytes(generator.randint(1, 5))
            elif kind == 2:
                del raw[at : at + generator.randint(1, 50)]
            else:
                raw = raw[: max(1, at)]
        return bytes(raw)
    fields = json.loads(good)
    for _ in range(generator.randint(1, 2)):
        place = generator.choice(list(places(fields)))
        owner, name = place
        junk: list[Any] = [
            None,
            True,
            -1,
            0,
            2**64,
            1e308,
            float("nan"),
            "",
            "x" * 300,
            "../x",
            [],
            {},
            [[]],
            "\ud800",
            deep(40),
        ]
        if generator.random() < 0.3 and isinstance(owner, dict):
            owner[generator.choice(["__class__", "key", "size", "x"])] = generator.choice(junk)
        elif generator.random() < 0.2:
            del owner[name]
        else:
            owner[name] = generator.choice(junk)
    return json.dumps(fields).encode()


def places(value: Any) -> Any:
    """All (container, key) pairs in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in list(items):
        yield value, name
        yield from places(inner)


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def test_a_name_is_made_fit_for_a_manifest() -> None:
    assert printable("org/model") == "org/model"
    assert printable("a\x1b[2J\udc80b") == "a?[2J?b"
    assert len(printable("x" * 999)) == 200


def test_too_much_for_a_manifest_is_said_when_it_is_written() -> None:
    chunks = manifest_of(CONTENT).chunks
    with pytest.raises(StoreError):
        manifest_of({}, chunks=(chunks[0], chunks[0])).to_json()
