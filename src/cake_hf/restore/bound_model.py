"""A model as a session uses it: the hook on it, the namespace of its chunks, and their layout."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cake_hf.chunks.codec import FORMAT_VERSION
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossy import Method
from cake_hf.keys import canonical, namespace_digest
from cake_hf.layers.compat import chosen_functions, installed_version
from cake_hf.limits import MIN_CHUNK_SIZE
from cake_hf.model.behaviour import Kept, behaviour, behaviour_digest, forget_rows, remember_rows, rows_changed
from cake_hf.model.code import code_digest, users_functions
from cake_hf.model.fingerprint import await_digest, begin_digest, forget_weights, model_metadata
from cake_hf.model.kv_layout import made_by
from cake_hf.model.look import one_look, where_computed
from cake_hf.model.numerics import numerics_metadata
from cake_hf.model.plainly import ComputePlainly
from cake_hf.model.ranks import parallel_metadata, ranks_of
from cake_hf.model.reference import ReferencePlace, computes_otherwise
from cake_hf.model.seal import ModelSeal
from cake_hf.model.vision import family_of
from cake_hf.report import Refusal
from cake_hf.restore.hook import ModelHook
from cake_hf.scheduling.planner import auto_chunk_size
from cake_hf.util.forks import cached_property
from cake_hf.util.redaction import shown

DOUBT_SECONDS = 10.0
"""How long a store that did not say which model its KV is from is not asked again. A namespace is made more than once for a
prompt, and has to be the same each time."""


class _Latest(NamedTuple):
    namespace: str
    metadata: dict[str, Any]


_latest: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[int, str, bool, str], _Latest]] = (
    weakref.WeakKeyDictionary()
)
"""The namespace that was found last, by model and options."""


class BoundModel:
    """One model, with the options that are part of its chunks' keys.

    Args:
        model: any that a `CakeCache` takes.
        chunk_size, salt, exact: as for `CakeCache`; the size as it was chosen.
        reference_place: returns where a store keeps what models compute under a namespace, given that namespace and the
            model's name. Called with `exact=False` only.
        lossy: the lossy codec that the KV goes through; None for none.
        compiled: what the user passed as the model.

    Attributes:
        hook: on the model; has to be detached.
        doubt: why a lossy cache could not ask the store which model its KV is from, and so has keys of its own for now.
        vouched_for: a namespace of which the store was seen to hold chunks; None for none yet.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        chunk_size: int,
        salt: str,
        exact: bool,
        reference_place: Callable[[str, str], ReferencePlace],
        lossy: Method | None = None,
        compiled: Any = None,
    ) -> None:
        self.model = model
        self.chunk_size = chunk_size
        self.salt = salt
        self.exact = exact
        self.vouched_for: str | None = None
        self.doubt: Refusal | None = None
        self._doubt_ends = 0.0
        self._seal: ModelSeal | None = None
        self._reference_place = reference_place
        self.lossy = lossy
        self._options = (chunk_size, salt, exact, "" if lossy is None else lossy.name)
        self.hook = ModelHook.attach(model)
        self.hook.stay_in_front(compiled)

    @cached_property
    def name(self) -> str:
        """The model's name for display: its Hub id, or the last part of a local path (the rest is private).

        Determined once, since this asks the file system and searches the environment for secrets, and each chunk contains the
        name.
        """
        name = str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)
        return shown(Path(name).name if Path(name).is_absolute() or Path(name).exists() else name)

    def layouts(self) -> tuple[ChunkLayout, ChunkLayout]:
        """Returns the layouts of this model's chunks, and of a snapshot of its recurrent states (no pieces if it has none)."""
        made = made_by(self.model)
        return made.chunk(self.chunk_size), made.states

    def layout(self) -> ChunkLayout:
        """Returns the first of `layouts`."""
        return self.layouts()[0]

    def state_layout(self) -> ChunkLayout:
        """Returns the second of `layouts`."""
        return self.layouts()[1]

    def namespace(self, ids: torch.Tensor | None = None) -> str:
        """Returns the digest of all that must be equal, beside the tokens, for KV to be interchangeable.

        Inspects all of it again.

        Args:
            ids: the token ids of the prompt. The weights that only these tokens use are inspected more closely.

        Raises:
            ComputePlainly: with `exact=False`, the store does not say which model its KV is from.
        """
        await_digest(self.model)
        if ids is not None and rows_changed(self.model, ids):
            forget_weights(self.model)
            forget_rows(self.model)
        metadata = self.metadata()
        namespace = self._digest(metadata)
        remember_rows(self.model)
        _latest.setdefault(self.model, {})[self._options] = _Latest(namespace, metadata)
        return namespace

    def begin_namespace(self) -> None:
        """Starts what `namespace` needs and what can run beside a forward of the model, if it is needed at all."""
        begin_digest(self.model, portable=not self.exact)

    def metadata(self) -> dict[str, Any]:
        """Returns the metadata that the namespace is a digest of, without the secret salt. Runs and inspects the model."""
        with one_look():
            return self._current_metadata()

    def latest_namespace(self) -> str:
        """Returns the last result of `namespace` for this model and these options, in this process.

        Empty if there is none, or if the model keeps its KV in another layout by now.
        """
        latest = _latest.get(self.model, {}).get(self._options)
        if latest is None or latest.metadata["layout"] != self.layout().tensor_table:
            return ""
        return latest.namespace

    def latest_metadata(self) -> dict[str, Any]:
        """Returns the metadata behind `latest_namespace`. Runs the model only if `namespace` was not called yet."""
        latest = _latest.get(self.model, {}).get(self._options)
        return self.metadata() if latest is None else latest.metadata

    def metadata_of(self, namespace: str) -> dict[str, Any] | None:
        """Returns the metadata of a namespace; None if it is no longer known."""
        latest = _latest.get(self.model, {}).get(self._options)
        return latest.metadata if latest is not None and latest.namespace == namespace else None

    def seal(self) -> ModelSeal:
        """Returns a seal on the model as it is now. To make one takes longer than to find that the last one still holds."""
        seal = self._seal
        if seal is None or seal.is_broken():
            seal = self._seal = ModelSeal(self.model)
        return seal

    def where_computed(self) -> str:
        """Returns the devices that the model computes on, in words; the costs of computing are those of these devices."""
        return where_computed(self.model)

    def _current_metadata(self) -> dict[str, Any]:
        seen, made = behaviour(self.model)
        layout, states = made.chunk(self.chunk_size), made.states
        metadata: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "chunk_size": self.chunk_size,
            "layout": layout.tensor_table,
            "model": model_metadata(self.model, portable=not self.exact),
        }
        if states.pieces:
            metadata["states"] = states.tensor_table
        if self.lossy is not None:
            metadata["codec"] = {"name": self.lossy.name, "version": self.lossy.rounding}
        if parallel := parallel_metadata(self.model, exact=self.exact):
            metadata["parallel"] = parallel
        if self.exact:
            metadata["numerics"] = {"transformers": installed_version(), **numerics_metadata(self.model)}
            metadata["code"] = code_digest(self.model, chosen_functions(self.model.config))
            metadata["behaviour"] = behaviour_digest(seen)
            return metadata
        if replaced := users_functions(self.model, chosen_functions(self.model.config)):
            metadata["code"] = replaced
        if self._computes_otherwise(metadata, seen):
            metadata["behaviour"] = behaviour_digest(seen)
        return metadata

    def _digest(self, metadata: dict[str, Any]) -> str:
        return namespace_digest(canonical({**metadata, "salt": self.salt}))

    def _computes_otherwise(self, metadata: dict[str, Any], seen: Kept) -> bool:
        """Returns whether the model differs from the one whose KV is stored under this metadata (without its behaviour)."""
        alone = ranks_of(self.model) is None  # otherwise one rank's store may answer, and another's may not
        reference_place = self._reference_place(self._digest(metadata), self.name) if alone else None
        content = canonical([metadata["model"], metadata.get("code")])
        if self.doubt is not None and time.monotonic() < self._doubt_ends:
            return True
        self.doubt = None
        try:
            return computes_otherwise(self.model, content, seen, reference_place)
        except ComputePlainly as because:
            if self.lossy is None:
                raise
            # Plain compute would be another output than the lossy schedule's. With keys of its own, nothing is mixed up.
            self.doubt, self._doubt_ends = because.refusal, time.monotonic() + DOUBT_SECONDS
            return True


def chosen_chunk_size(model: torch.nn.Module, chunk_size: int | str) -> int:
    """Returns the chunk size in tokens; "auto" depends on the device (see `auto_chunk_size`).

    Raises:
        ValueError: it is neither a number of tokens nor "auto"; or it is too small.
    """
    if chunk_size == "auto":
        family = family_of(model)
        return auto_chunk_size(
            torch.device(where_computed(model)).type, ties_images=family is not None and bool(family.types)
        )
    if isinstance(chunk_size, (str, float)):
        raise ValueError(f'chunk_size is a number of tokens, or "auto"; got {shown(chunk_size)!r}.')
    if chunk_size < MIN_CHUNK_SIZE:
        raise ValueError(f"chunk_size must be at least {MIN_CHUNK_SIZE} tokens, got {chunk_size}; try 512.")
    return int(chunk_size)
