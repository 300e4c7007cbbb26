"""Mismatch reasons: explains in words why KV made under some metadata cannot serve a model under other metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from cake_hf.util.redaction import escaped

MOST_NAMED = 3
MAX_VALUE = 40
DIGESTS = ("model.weights", "code", "behaviour")
"""Metadata whose values mean nothing to people."""


def why_not(theirs: Mapping[str, Any], salted: bool, ours: Mapping[str, Any]) -> str:
    """Returns the most important mismatch, as the end of a sentence that starts with "the pack".

    Args:
        theirs: metadata of the pack, without its salt.
        salted: whether the pack was made with a salt.
        ours: metadata of the model and its options, without a salt; the namespaces are known to differ.
    """
    different = list(differences(theirs, ours))
    exact = "numerics" in theirs
    if theirs.get("format") != ours.get("format"):
        return "holds chunks of another format version; use the cake_hf that fits, or a new pack"
    if theirs.get("chunk_size") != ours.get("chunk_size"):
        return (
            f"has chunks of {short(theirs.get('chunk_size'))} tokens; pass chunk_size={short(theirs.get('chunk_size'))}"
        )
    if (codec := lossy_codec(theirs)) != lossy_codec(ours):
        if codec:
            return f"holds KV of the lossy codec {codec}; pass codec='{codec}' and exact=False"
        return "holds KV without a lossy codec; leave codec= out"
    if dtypes(theirs) != dtypes(ours) and dtypes(theirs) and dtypes(ours):
        return f"holds KV of dtype {dtypes(theirs)}, this model's is {dtypes(ours)}; load the model in that dtype"
    if any(not path.startswith("numerics") and path not in DIGESTS for path, _, _ in different):
        return f"was made with another model ({_named(different)})"
    if exact != ("numerics" in ours):
        return f"was made with exact={exact}; pass exact={exact}"
    if any(path == "model.weights" for path, _, _ in different):
        return "was made with other weights of this kind of model; use that model and its revision"
    if any(path.startswith("numerics") for path, _, _ in different):
        return f"was made with other numerics ({_named(different)}); use a pack made with exact=False"
    if different:
        return "was made with a model that computes something else: that one or this one is patched, steered or edited"
    return "was made with another salt; pass its salt" if salted else "was made without a salt; pass none"


def lossy_codec(facts: Mapping[str, Any]) -> str:
    """Returns the name of the lossy codec that the metadata names; empty if it names none."""
    codec = facts.get("codec")
    return plain(str(codec.get("name"))) if isinstance(codec, Mapping) else ""


def dtypes(facts: Mapping[str, Any]) -> str:
    """Returns the dtypes of the KV that the metadata describes, as safetensors names them; empty if unknown."""
    layout = facts.get("layout")
    entries = layout.values() if isinstance(layout, dict) else []
    return ", ".join(sorted({plain(str(entry.get("dtype"))) for entry in entries if isinstance(entry, dict)}))


def differences(theirs: Any, ours: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Iterates over all differences, depth first, as (path, their value, our value)."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for name in sorted({*theirs, *ours}):
            yield from differences(theirs.get(name), ours.get(name), f"{path}.{name}" if path else name)
    elif theirs != ours:
        yield path, theirs, ours


def _named(different: list[tuple[str, Any, Any]]) -> str:
    telling = [entry for entry in different if entry[0] not in DIGESTS]
    named = [
        f"{plain(path.rpartition('.')[2])}: {short(there)} there, {short(here)} here" for path, there, here in telling
    ]
    more = len(named) - MOST_NAMED
    return "; ".join(named[:MOST_NAMED] + ([f"and {more} more"] if more > 0 else []))


def short(value: Any) -> str:
    """Returns a metadata value in a short form for a sentence."""
    return plain(json.dumps(value, default=str))


def plain(text: str) -> str:
    """Returns an untrusted text, shortened and escaped so that a terminal may show it."""
    harmless = escaped(text[: MAX_VALUE + 1])
    return harmless if len(harmless) <= MAX_VALUE else f"{harmless[:MAX_VALUE]}..."
