"""Describes in words how stored chunks were made differently from this process's, and what to do about it.

`mismatch` gives one reason for a whole pack; this module handles each metadata entry by itself, with advice for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cake_hf.stores.mismatch import differences, dtypes, lossy_codec, plain, short

OPTIONS, NUMERICS, DTYPE, ADAPTERS, EDITED, WEIGHTS, OTHER_MODEL, FORMAT = range(8)
"""How severe a difference is, from one that an argument removes to one that cannot be removed."""

MOST_SAID = 3
INEXACT = "use exact=False on both sides"
_MAKERS = ("vendor_id", "implementer", "cpu")
"""Fields of a processor's description whose values are names of makers."""

_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        there: what the chunks were made with.
        here: the counterpart in this process; empty if it need not be mentioned.
        whose: the words that introduce `here`, such as "this process has".
        cure: what to do; empty if nothing can be done.
        severity: one of the constants above.
        brief: replaces `here` if this is the only difference.
    """

    there: str
    here: str = ""
    whose: str = ""
    cure: str = ""
    severity: int = NUMERICS
    brief: str = ""


def between(theirs: Mapping[str, Any], ours: Mapping[str, Any], their_model: str, our_model: str) -> list[Difference]:
    """Returns the differences between two namespaces, the most important first; the salt is not among them.

    Args:
        theirs: metadata of the chunks, as JSON values; untrusted.
        ours: metadata of this process, as JSON values.
        their_model, our_model: the models' names, for people.
    """
    changed = {path: (there, here) for path, there, here in differences(theirs, ours)}
    if "format" in changed:
        return [
            Difference("another format of chunks", cure="use the version of cake_hf that made them", severity=FORMAT)
        ]
    found = list(_options(theirs, ours)) + list(_model(theirs, ours, changed, their_model, our_model))
    if "numerics" in theirs and "numerics" in ours:
        found += _numerics(_part(theirs, "numerics"), _part(ours, "numerics"))
    if found:
        return found
    if changed.keys() & {"code", "behaviour"}:
        cure = "look for what is patched, steered or edited there or here"
        return [Difference("a model that computes something else", severity=EDITED, cure=cure)]
    return [Difference("another layout of KV", severity=FORMAT, cure="use the versions that made them")]


def severity(found: Sequence[Difference]) -> tuple[int, int]:
    """Returns a sort key: the highest severity, and the number of differences."""
    return max((one.severity for one in found), default=0), len(found)


def in_a_sentence(found: Sequence[Difference]) -> str:
    """Returns the differences, and what to do about them, as the end of a sentence such as "they are stored, "."""
    said, more = found[:MOST_SAID], len(found) - MOST_SAID
    there = [one.there for one in said] + ([f"{more} more"] if more > 0 else [])
    here = [one for one in said if one.here]
    whose = {one.whose for one in here}
    text = f"made with {_joined(there)}"
    if len(found) == 1 and here:
        text += f"; {here[0].whose} {here[0].brief or here[0].here}"
    elif here:
        text += f"; {whose.pop() if len(whose) == 1 else 'here there are'} {_joined([one.here for one in here])}"
    return f"{text}: {cure}" if (cure := _cure(found)) else text


def _cure(found: Sequence[Difference]) -> str:
    """Returns what to do about all differences; empty if nothing helps."""
    others = [one.cure for one in found if one.severity != NUMERICS]
    numerics = [one.cure for one in found if one.severity == NUMERICS]
    first = "; ".join(others[:MOST_SAID])
    if not numerics:
        return first
    can_be_set = all(numerics) and len(found) <= MOST_SAID
    either = f"{_joined(numerics)}, or {INEXACT}" if can_be_set else INEXACT
    return f"{first}; {either}" if others else either


def _options(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Difference]:
    there, here = theirs.get("chunk_size"), ours.get("chunk_size")
    if there != here:
        told, cure = f"chunks of {short(there)} tokens", f"pass chunk_size={short(there)}"
        yield Difference(told, f"chunks of {short(here)}", "this cache has", cure, OPTIONS)
    codec, mine = lossy_codec(theirs), lossy_codec(ours)
    if codec != mine:
        cure = f"pass codec='{codec}'" if codec else "leave codec= out"
        yield Difference(
            f"the lossy codec {codec}" if codec else "no lossy codec", mine or "none", "this cache has", cure, OPTIONS
        )
    elif theirs.get("codec") != ours.get("codec"):
        yield Difference(
            f"another version of the codec {codec}", cure="use the version of cake_hf that made them", severity=FORMAT
        )
    exact = "numerics" in theirs
    if exact != ("numerics" in ours):
        cure = (
            "pass exact=True if everything else matches, or exact=False on both sides" if exact else "pass exact=False"
        )
        yield Difference(f"exact={exact}", f"exact={not exact}", "this cache has", cure, OPTIONS)


def _model(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]],
    their_model: str,
    our_model: str,
) -> Iterator[Difference]:
    """Iterates over the model's differences; only the most telling of weights, config and dtype, since they come together."""
    there, here = _part(theirs, "model"), _part(ours, "model")
    other_weights = "model.weights" in changed and _digested_alike(theirs, ours)
    config = [path.removeprefix("model.config.") for path in changed if path.startswith("model.config")]
    dtype = _dtypes(theirs), _dtypes(ours)
    other_dtype = dtype[0] != dtype[1] and all(dtype)
    if (adapters := _adapters(there, here)) is not None:
        yield adapters
    elif "model.class" in changed or (config and other_weights and not _only_newer(config, theirs, ours)):
        name = f"another model ({plain(their_model)})"
        yield Difference(name, plain(our_model), "this one is", "load that model", OTHER_MODEL)
    elif other_dtype:
        cure = f"load the model with dtype=torch.{dtype[0]}"
        yield Difference(f"KV in {dtype[0]}", dtype[1], "this model's is in", cure, DTYPE)
    elif "model.modules" in changed:
        cure = "put the same modules into the model"
        yield Difference("other modules in the model", severity=EDITED, cure=cure)
    elif other_weights:
        mine = "" if our_model == their_model else plain(our_model)
        cure = "load the same revision, with the same adapters and changes"
        yield Difference(f"other weights of {plain(their_model)}", mine, "this model is", cure, WEIGHTS)
    elif config and not _only_newer(config, theirs, ours):
        yield _settings("the config's ", config, _part(there, "config"), _part(here, "config"))
    if "model.rounded" in changed and not other_dtype:
        cure = "bring the model into its dtype in the same way, by from_pretrained(dtype=...) or by .to(...)"
        yield Difference("other rounding of what the model derives from its config", severity=DTYPE, cure=cure)
    if any(path.startswith("parallel") for path in changed):
        cure = "run it in as many processes"
        yield Difference("another number of processes for one model", severity=OTHER_MODEL, cure=cure)


def _digested_alike(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Returns whether equal weights have equal checksums on both sides.

    On a GPU, checksums are computed in another way, unless they have to be portable.
    """

    def where(facts: Mapping[str, Any]) -> Any:
        return _part(facts, "numerics").get("device", "cpu")

    return bool(where(theirs) == where(ours))


def _adapters(there: Mapping[str, Any], here: Mapping[str, Any]) -> Difference | None:
    theirs, ours = there.get("adapters") or [], here.get("adapters") or []
    if theirs == ours:
        return None
    if not ours:
        return Difference("an adapter", "none", "this model has", "load the same adapter", ADAPTERS)
    if not theirs:
        return Difference("no adapter", "one", "this model has", "unload it, or leave its KV to be made", ADAPTERS)
    return Difference("another adapter, or another setting of it", severity=ADAPTERS, cure="load the same adapter")


def _only_newer(config: Sequence[str], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Returns whether configs may differ only because another version of transformers fills in other entries."""
    there, here = _part(theirs, "numerics"), _part(ours, "numerics")
    return bool(config) and bool(there) and bool(here) and there.get("transformers") != here.get("transformers")


def _settings(of: str, names: Sequence[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> Difference:
    told = [f"{of}{plain(name)} {short(_at(there, name))}" for name in names]
    mine = [short(_at(here, name)) for name in names]
    if len(told) > MOST_SAID:
        told, mine = [*told[:MOST_SAID], f"{len(told) - MOST_SAID} more"], [*mine[:MOST_SAID], "others"]
    return Difference(_joined(told), _joined(mine), "this model has", "load it with the same config", EDITED)


def _numerics(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Difference]:
    """Iterates over the differences in numerics, the most useful for people first."""
    changed = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if "device" in changed:  # all other entries depend on the device
        there, here = (plain(str(side.get("device"))) for side in (theirs, ours))
        yield Difference(f"device {there}", f"device {here}", "this process has", "")
        return
    if "processor" in changed:
        changed = [name for name in changed if name != "hardware"]  # torch's name of it says less
    for name in [*_KNOWN, *sorted(set(changed) - set(_KNOWN))]:
        if name in changed:
            yield _KNOWN.get(name, _plainly(name))(theirs.get(name), ours.get(name))


Tell = Callable[[Any, Any], Difference]


def _plainly(name: str) -> Tell:
    def tell(there: Any, here: Any) -> Difference:
        first = next(differences(there, here), ("", there, here))
        path = ".".join(filter(None, (name, first[0])))
        return Difference(f"{plain(path)} {short(first[1])}", f"{short(first[2])}", "this process has", "")

    return tell


def _threads(there: Any, here: Any) -> Difference:
    told, mine = (f"{short(n)} thread{'' if n == 1 else 's'}" for n in (there, here))
    return Difference(told, mine, "this process has", f"call torch.set_num_threads({short(there)})", brief=short(here))


def _attention(there: Any, here: Any) -> Difference:
    _, there, here = next(differences(there, here), ("", there, here))
    told, mine = (plain(str(side)) for side in (there, here))
    cure = f"pass attn_implementation='{told}' to from_pretrained"
    return Difference(f"attention {told}", f"attention {mine}", "this model has", cure, brief=mine)


def _experts(there: Any, here: Any) -> Difference:
    told, mine = (plain(str(side)) for side in (there, here))
    cure = f"pass experts_implementation='{told}' to from_pretrained"
    return Difference(f"experts {told}", f"experts {mine}", "this model has", cure, brief=mine)


def _version(package: str) -> Tell:
    def tell(there: Any, here: Any) -> Difference:
        told, mine = (plain(str(side)) for side in (there, here))
        cure = f"install {package} {told}"
        return Difference(f"{package} {told}", f"{package} {mine}", "this process has", cure, brief=mine)

    return tell


def _deterministic(there: Any, here: Any) -> Difference:
    told, mine = (f"deterministic algorithms {'on' if side else 'off'}" for side in (there, here))
    return Difference(told, mine, "this process has", f"call torch.use_deterministic_algorithms({bool(there)})")


def _autocast(there: Any, here: Any) -> Difference:
    told, mine = (f"autocast {plain(str(side))}" for side in (there, here))
    return Difference(told, mine, "this process has", "use the same torch.autocast")


def _processor(there: Any, here: Any) -> Difference:
    told, mine = (_processor_name(side) for side in (there, here))
    if told == mine:
        path, *_ = next(differences(there, here), ("", there, here))
        return Difference(f"other instructions of the processor ({plain(path.rpartition('.')[2])})")
    return Difference(f"another processor ({told})", mine, "this one is", "")


def _hardware(there: Any, here: Any) -> Difference:
    return Difference(f"hardware {plain(str(there))}", plain(str(here)), "this process has", "")


def _processor_name(told: Any) -> str:
    """Returns maker and model from a system's description of its processor."""
    if not isinstance(told, Mapping):
        return plain(str(told))
    parts = {name.removeprefix("cpu "): value for name, value in told.items() if isinstance(value, str)}
    makers = [value for name, value in parts.items() if name in _MAKERS]
    return plain(", ".join([*makers, *(f"{name} {value}" for name, value in parts.items() if name not in _MAKERS)]))


_KNOWN: dict[str, Tell] = {
    "threads": _threads,
    "attention": _attention,
    "experts": _experts,
    "transformers": _version("transformers"),
    "torch": _version("torch"),
    "processor": _processor,
    "hardware": _hardware,
    "autocast": _autocast,
    "deterministic": _deterministic,
}
"""Entries of the numerics that have wording of their own, in the order in which they are reported."""


def _dtypes(facts: Mapping[str, Any]) -> str:
    return ", ".join(_TORCH.get(name, name) for name in dtypes(facts).split(", "))


def _part(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a mapping inside the metadata; empty if there is no such mapping."""
    part = facts.get(name)
    return part if isinstance(part, Mapping) else {}


def _at(facts: Any, path: str) -> Any:
    for name in path.split("."):
        facts = facts.get(name) if isinstance(facts, Mapping) else None
    return facts


def _joined(parts: Sequence[str]) -> str:
    parts = [part for part in parts if part]
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
