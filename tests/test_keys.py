"""Laws of chunk keys: equal prefixes have equal keys, and anything else has other ones."""

from __future__ import annotations

import hashlib
from array import array

from hypothesis import given
from hypothesis import strategies as st

from cake_hf.keys import chunk_keys, namespace_digest

SPACE = namespace_digest("one")
tokens = st.lists(st.integers(0, 2**31), max_size=60)
sizes = st.integers(1, 16)


@given(tokens, sizes)
def test_one_key_per_full_chunk(ids: list[int], size: int) -> None:
    keys = chunk_keys(SPACE, ids, size)
    assert len(keys) == len(ids) // size
    assert all(len(key) == 40 and set(key) <= set("0123456789abcdef") for key in keys)
    assert len(set(keys)) == len(keys)


@given(tokens, tokens, tokens, sizes)
def test_keys_tell_how_far_two_prompts_are_equal(start: list[int], one: list[int], two: list[int], size: int) -> None:
    first, second = start + one, start + two
    alike = [a == b for a, b in zip(chunk_keys(SPACE, first, size), chunk_keys(SPACE, second, size), strict=False)]
    equal_prefixes = [first[:end] == second[:end] for end in range(size, min(len(first), len(second)) + 1, size)]
    assert alike == equal_prefixes


@given(tokens, sizes, st.integers(0, 60))
def test_keys_go_on_from_a_parent(ids: list[int], size: int, at: int) -> None:
    keys = chunk_keys(SPACE, ids, size)
    done = min(at, len(keys))
    parent = keys[done - 1] if done else ""
    assert keys[:done] + chunk_keys(SPACE, ids[done * size :], size, parent) == keys


@given(st.lists(st.integers(0, 9), min_size=4, max_size=40))
def test_every_namespace_has_keys_of_its_own(ids: list[int]) -> None:
    other = namespace_digest("two")
    assert not set(chunk_keys(SPACE, ids, 4)) & set(chunk_keys(other, ids, 4))
    parent = chunk_keys(SPACE, [1, 2, 3, 4], 4)[0]
    assert not set(chunk_keys(SPACE, ids, 4, parent)) & set(chunk_keys(other, ids, 4, parent))


@given(st.lists(st.integers(0, 9), min_size=12, max_size=40))
def test_every_chunk_size_has_keys_of_its_own(ids: list[int]) -> None:
    assert not set(chunk_keys(SPACE, ids, 4)) & set(chunk_keys(SPACE, ids, 6))


def test_equal_chunks_at_other_places_have_other_keys() -> None:
    assert len(set(chunk_keys(SPACE, [7] * 64, 8))) == 8


@given(st.text(), st.text())
def test_namespaces_are_equal_for_equal_facts_only(one: str, two: str) -> None:
    assert (namespace_digest(one) == namespace_digest(two)) == (one == two)


def test_keys_never_change_between_versions() -> None:
    """Stores outlive library versions: a change here orphans everything that anyone has stored."""
    assert namespace_digest("facts") == "254f3d816854bb631de61b33ff119bc86103e426"
    assert chunk_keys(namespace_digest("facts"), range(8), 4) == [
        "887ba8fc914b9408d981c3603a5980703d3cc505",
        "b68ee5e3d606c6c3c799aee8d40bbb9669cbf547",
    ]


def test_the_key_is_the_documented_digest() -> None:
    """Made here by hand: blake2b over namespace, parent and the tokens as little-endian 64-bit integers."""
    raw = b"".join(token.to_bytes(8, "little") for token in (5, 6))
    space = bytes.fromhex(SPACE)
    by_hand = hashlib.blake2b(space + space + raw, digest_size=20, person=b"cake-chunk").hexdigest()
    assert chunk_keys(SPACE, [5, 6], 2) == [by_hand]


def test_ids_need_not_be_copied() -> None:
    ids = array("q", [5, 2**40, 0, 7] * 16)
    namespace = namespace_digest("facts")
    assert chunk_keys(namespace, memoryview(ids), 16) == chunk_keys(namespace, list(ids), 16)
    narrow = array("i", [5, 6, 0, 7] * 16)
    assert chunk_keys(namespace, memoryview(narrow), 16) == chunk_keys(namespace, list(narrow), 16)
