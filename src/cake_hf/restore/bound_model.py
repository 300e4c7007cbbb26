"""A model as a session uses it: the hook on it, the names of its chunks, and their layout."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from cake_hf.chunks.codec import FORMAT_VERSION
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.keys import namespace_digest
from cake_hf.layers.compat import chosen_functions
from cake_hf.limits import MIN_CHUNK_SIZE
from cake_hf.model.behaviour import Kept, behaviour, behaviour_digest
from cake_hf.model.code import code_digest, users_functions
from cake_hf.model.embedding_rows import forget_rows, remember_rows, rows_changed
from cake_hf.model.fingerprint import forget_weights, model_facts
from cake_hf.model.kv_layout import made_by
from cake_hf.model.look import one_look
from cake_hf.model.numerics import numerics_facts
from cake_hf.model.offload import where_computed
from cake_hf.model.ranks import parallel_facts, ranks_of
from cake_hf.model.reference import Shelf, computes_otherwise
from cake_hf.model.vision import family_of
from cake_hf.restore.hook import ModelHook
from cake_hf.scheduling.chunk_size import auto_chunk_size
from cake_hf.util.canonical import canonical
from cake_hf.util.lazy import cached_property
from cake_hf.util.redaction import shown


class _Latest(NamedTuple):
    namespace: str
    facts: dict[str, Any]


_latest: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[int, str, bool], _Latest]] = weakref.WeakKeyDictionary()
"""By model and options: the namespace that was found last."""


class BoundModel:
    """One model with the options that are part of its chunks' names.

    Args:
        model: any that a `CakeCache` takes.
        chunk_size, salt, exact: as for `CakeCache`; the size as it was chosen.
        shelf: gives where a store keeps what models compute under a namespace, from that and the model's name. Asked with
            `exact=False` only.
        compiled: what the user gave for the model.

    Attributes:
        model, chunk_size, salt, exact: as given.
        hook: on the model; has to be detached.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        chunk_size: int,
        salt: str,
        exact: bool,
        shelf: Callable[[str, str], Shelf],
        compiled: Any = None,
    ) -> None:
        self.model = model
        self.chunk_size = chunk_size
        self.salt = salt
        self.exact = exact
        self._shelf = shelf
        self._options = (chunk_size, salt, exact)
        self.hook = ModelHook.attach(model)
        self.hook.stay_in_front(compiled)

    @cached_property
    def name(self) -> str:
        """The model's name for people: its Hub id, or the last part of a local path (the rest is private).

        Found once, since it asks the file system, goes through the environment for secrets, and stands in each chunk.
        """
        name = str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)
        return shown(Path(name).name if Path(name).is_absolute() or Path(name).exists() else name)

    def layout(self) -> ChunkLayout:
        """The layout of this model's chunks."""
        return made_by(self.model).chunk(self.chunk_size)

    def state_layout(self) -> ChunkLayout:
        """The layout of a snapshot of this model's recurrent states; without pieces where it has none."""
        return made_by(self.model).states

    def namespace(self, ids: torch.Tensor | None = None) -> str:
        """Digest of all that must be equal, beside the tokens, for KV to be interchangeable. Looks at all of it anew.

        Args:
            ids: of the prompt. The weights that only these tokens meet are looked at more closely.

        Raises:
            ComputePlainly: with `exact=False`, the store does not say which model its KV is of.
        """
        if ids is not None and rows_changed(self.model, ids):
            forget_weights(self.model)
            forget_rows(self.model)
        facts = self.facts()
        namespace = self._digest(facts)
        remember_rows(self.model)
        _latest.setdefault(self.model, {})[self._options] = _Latest(namespace, facts)
        return namespace

    def facts(self) -> dict[str, Any]:
        """The facts that the namespace is a digest of, without the salt, which is secret. Runs the model, and looks at it."""
        with one_look():
            return self._facts()

    def latest_namespace(self) -> str:
        """What `namespace` gave last for this model and these options, in this process; empty if it was not called yet."""
        latest = _latest.get(self.model, {}).get(self._options)
        return "" if latest is None else latest.namespace

    def latest_facts(self) -> dict[str, Any]:
        """The facts behind `latest_namespace`. Runs the model only if `namespace` was not called yet."""
        latest = _latest.get(self.model, {}).get(self._options)
        return self.facts() if latest is None else latest.facts

    def facts_of(self, namespace: str) -> dict[str, Any] | None:
        """The facts of a namespace; None where they are not known any more."""
        latest = _latest.get(self.model, {}).get(self._options)
        return latest.facts if latest is not None and latest.namespace == namespace else None

    def where_computed(self) -> str:
        """On which devices, in words; what computing costs is that of these."""
        return where_computed(self.model)

    def _facts(self) -> dict[str, Any]:
        seen = behaviour(self.model)
        facts: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "chunk_size": self.chunk_size,
            "layout": self.layout().tensor_table,
            "model": model_facts(self.model, portable=not self.exact),
        }
        if states := self.state_layout().tensor_table:
            facts["states"] = states
        if parallel := parallel_facts(self.model, exact=self.exact):
            facts["parallel"] = parallel
        if self.exact:
            facts["numerics"] = {"transformers": transformers.__version__, **numerics_facts(self.model)}
            facts["code"] = code_digest(self.model, chosen_functions(self.model.config))
            facts["behaviour"] = behaviour_digest(seen)
            return facts
        if replaced := users_functions(self.model, chosen_functions(self.model.config)):
            facts["code"] = replaced
        if self._computes_otherwise(facts, seen):
            facts["behaviour"] = behaviour_digest(seen)
        return facts

    def _digest(self, facts: dict[str, Any]) -> str:
        return namespace_digest(canonical({**facts, "salt": self.salt}))

    def _computes_otherwise(self, facts: dict[str, Any], seen: Kept) -> bool:
        """Whether the model differs from the one whose KV is stored under these facts, all but that of its behaviour."""
        alone = ranks_of(self.model) is None  # else one rank's store may answer, and another's not
        shelf = self._shelf(self._digest(facts), self.name) if alone else None
        content = canonical([facts["model"], facts.get("code")])
        return computes_otherwise(self.model, content, seen, shelf)


def chosen_chunk_size(model: torch.nn.Module, chunk_size: int | str) -> int:
    """The number of tokens that is meant; "auto" is by the device (see `scheduling.chunk_size`).

    Raises:
        ValueError: it is neither a number of tokens, nor "auto"; or too small.
    """
    if chunk_size == "auto":
        family = family_of(model)
        return auto_chunk_size(
            torch.device(where_computed(model)).type, ties_images=family is not None and bool(family.types)
        )
    if isinstance(chunk_size, str):
        raise ValueError(f'chunk_size is a number of tokens, or "auto"; got {shown(chunk_size)!r}.')
    if chunk_size < MIN_CHUNK_SIZE:
        raise ValueError(f"chunk_size must be at least {MIN_CHUNK_SIZE} tokens, got {chunk_size}; try 512.")
    return chunk_size
