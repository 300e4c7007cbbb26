"""What a cache, and its copies, share: the model, the store, the writer, and what both ends agree on (keys, layout)."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers

from cake_hf.arithmetic.chunk_size import auto_chunk_size
from cake_hf.arithmetic.forks import Lock
from cake_hf.arithmetic.frontier import Strategy
from cake_hf.arithmetic.interrupts import is_the_users
from cake_hf.arithmetic.keys import namespace_digest
from cake_hf.arithmetic.lazily import cached_property
from cake_hf.arithmetic.limits import MIN_CHUNK_SIZE, Limits
from cake_hf.arithmetic.outside import shown
from cake_hf.arithmetic.report import Report
from cake_hf.cache.at_work import AtWork
from cake_hf.cache.behaviour import Kept, behaviour, behaviour_digest
from cake_hf.cache.compat import chosen_functions
from cake_hf.cache.hook import ModelHook
from cake_hf.cache.probe import chunk_layout, kv_like, state_layout
from cake_hf.cache.reference import Shelf, computes_otherwise
from cake_hf.cache.vision import family_of
from cake_hf.movers.access import Access
from cake_hf.movers.cost_memory import CostMemory, flush_costs, note_seconds, recall_costs
from cake_hf.movers.hits import count_hits, flush_hits
from cake_hf.movers.recording import recorder
from cake_hf.movers.sharing import Sharing, sharing_of
from cake_hf.movers.streams import let_copies_out_end
from cake_hf.movers.telemetry import observe, observe_save
from cake_hf.movers.writer import SaveJob, pack
from cake_hf.stores.base import Store
from cake_hf.stores.names import store_name
from cake_hf.stores.opening import StoreSpec
from cake_hf.tensors.code import code_digest, users_functions
from cake_hf.tensors.codec import FORMAT_VERSION, ChunkFacts, stored_bytes
from cake_hf.tensors.fingerprint import canonical, forget_weights, model_facts
from cake_hf.tensors.layout import ChunkLayout
from cake_hf.tensors.numerics import numerics_facts
from cake_hf.tensors.offload import where_computed
from cake_hf.tensors.parallel import parallel_facts, ranks_of
from cake_hf.tensors.rows import forget_rows, remember_rows, rows_changed


class _Latest(NamedTuple):
    namespace: str
    facts: dict[str, Any]


_latest: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[int, str, bool], _Latest]] = weakref.WeakKeyDictionary()
"""By model and options: the namespace that was found last."""


class Session:
    """The long-lived half of a `CakeCache`; see there for the arguments."""

    def __init__(
        self,
        model: torch.nn.Module,
        store: StoreSpec | None,
        *,
        chunk_size: int | str,
        salt: str,
        save: bool,
        exact: bool,
        strategy: Strategy,
        limits: Limits,
        snapshot_every: int = 0,
        compiled: Any = None,
    ) -> None:
        chunk_size = chosen_chunk_size(model, chunk_size)
        self.model = model
        self.chunk_size = chunk_size
        self.salt = salt
        self.exact = exact
        self.strategy = strategy
        self.limits = limits
        self.snapshot_every = snapshot_every
        self._access = Access(store, limits, save=save, share=sharing_of)
        self.store_name = store_name(store)
        self._count_lock = Lock()
        self._options = (chunk_size, salt, exact)
        self.is_closed = False  # as `closed`; a plain attribute, which torch.compile can trace
        self.at_work = AtWork()
        self._hook = ModelHook.attach(model)
        self._hook.stay_in_front(compiled)
        # When the last cache of this session is gone, and nobody has closed it.
        self._release = weakref.finalize(self, _forsake, self._hook, self._access)
        self._release.atexit = False

    def stay_in_front(self) -> None:
        """The model may have been compiled since."""
        self._hook.stay_in_front()

    @property
    def store(self) -> Store:
        """Where chunks are kept; a store that has nothing while it cannot be used."""
        return self._access.store

    @property
    def save(self) -> bool:
        """Whether new chunks are brought to the store."""
        return self._access.saves

    @property
    def sharing(self) -> Sharing:
        """What all users of the store share."""
        return self._access.sharing

    def reach_store(self) -> str:
        """Where the store could not be used, try again after a while; says why there is none, or nothing."""
        return self._access.reach()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._release.alive

    def flush(self, timeout: float | None) -> bool:
        """Wait until all that is to be saved is durable; False on time-out."""
        return self._access.flush(timeout)

    def close(self) -> bool:
        """Remove the hook, save what is queued (with one bound), close the store if it is ours; False on time-out."""
        self.is_closed = True
        if not self._release.detach():
            return True
        end = time.monotonic() + self.limits.exit_flush_seconds
        self._hook.detach()
        flushed = self._access.writer.close()
        flush_costs(self.store, max(0.0, end - time.monotonic()))
        flush_hits(self.store, end - time.monotonic())
        self._access.close_store(end - time.monotonic())
        return flushed

    @cached_property
    def model_name(self) -> str:
        """The model's name for people: its Hub id, or the last part of a local path (the rest is private).

        Found once, since it asks the file system and goes through the environment for secrets, and stands in each chunk.
        """
        name = str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)
        return shown(Path(name).name if Path(name).is_absolute() or Path(name).exists() else name)

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
        facts = self.namespace_facts()
        namespace = self._digest(facts)
        remember_rows(self.model)
        _latest.setdefault(self.model, {})[self._options] = _Latest(namespace, facts)
        return namespace

    def latest_namespace(self) -> str:
        """What `namespace` gave last for this model and these options, in this process; empty if it was not called yet."""
        latest = _latest.get(self.model, {}).get(self._options)
        return "" if latest is None else latest.namespace

    def latest_facts(self) -> dict[str, Any]:
        """The facts behind `latest_namespace`. Runs the model only if `namespace` was not called yet."""
        latest = _latest.get(self.model, {}).get(self._options)
        return self.namespace_facts() if latest is None else latest.facts

    def namespace_facts(self) -> dict[str, Any]:
        """The facts that the namespace is a digest of, without the salt, which is secret."""
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
        shelf = None
        if ranks_of(self.model) is None:  # one rank's store may answer, and another's not
            sharing, seconds = self.sharing, self.limits.lookup_timeout
            place = self._digest(facts), self.model_name, self.save
            shelf = Shelf(self.store, *place, seconds, sharing.lookups, sharing.claims)
        content = canonical([facts["model"], facts.get("code")])
        return computes_otherwise(self.model, content, seen, shelf)

    def layout(self) -> ChunkLayout:
        """The layout of this model's chunks."""
        return chunk_layout(kv_like(self.model), self.chunk_size)

    def state_layout(self) -> ChunkLayout:
        """The layout of a snapshot of this model's recurrent states; without pieces where it has none."""
        return state_layout(kv_like(self.model))

    def cost_memory(self, namespace: str) -> CostMemory:
        """What computing and loading cost with this model, device and store."""
        return recall_costs(self.store, namespace, where_computed(self.model), self.limits, self.sharing.notes)

    def count(self, report: Report) -> None:
        """A prompt is through: tell who watches, and count it beside the store."""
        observe(report)
        count_hits(self.store, report, self.limits, self.sharing.notes)

    def save_chunk(
        self,
        facts: ChunkFacts,
        layout: ChunkLayout,
        pieces: Callable[[], Sequence[torch.Tensor]],
        report: Report,
        *,
        overwrite: bool,
        what: Literal["chunk", "tail", "state"] = "chunk",
    ) -> None:
        """Copy a chunk out and queue it, or count it as unsaved where there is no room. Never waits.

        Before a chunk's tensors are written to again, `let_copies_out_end` has to be called.

        Args:
            facts: of the chunk, without its checksums.
            layout: of the chunk.
            pieces: gives its tensors `[1, chunk_size, heads, head_dim]` in payload order; called only if there is room.
            report: where the outcome is counted.
            overwrite: replace a stored chunk that turned out to be unusable.
            what: it is; a state is that at the end of a chunk or a tail.
        """

        record = self._recorder(facts)

        def done(saved: bool) -> None:
            if saved:
                record()
            with self._count_lock:
                if what == "state":
                    report.states_saved += saved
                elif what == "tail":
                    report.tails_saved += saved
                    report.chunks_unsaved += not saved
                else:
                    report.chunks_saved += saved
                    report.chunks_unsaved += not saved
                report.bytes_saved += layout.nbytes * saved
                report.bytes_stored += stored_bytes(layout) * (saved and not overwrite)
            observe_save(saved, layout.nbytes)

        writer = self._access.writer
        if not writer.has_room(layout.nbytes):
            done(False)
            return
        try:
            payload = pack(pieces(), layout)
        except (MemoryError, RuntimeError) as error:  # there is no memory for it
            if is_the_users(error):
                raise
            writer.tell(error)
            done(False)
            return
        finally:
            if what == "state":
                # The next chunk changes it. A chunk's KV stays while its restore lasts: who writes there, writes the same.
                let_copies_out_end()
        if not writer.offer(SaveJob(facts, layout, payload, overwrite, done)):
            done(False)

    def _recorder(self, chunk: ChunkFacts) -> Callable[[], None]:
        """Keeps what the chunk was made with in the store, once it is there."""
        latest = _latest.get(self.model, {}).get(self._options)
        if latest is None or latest.namespace != chunk.namespace:
            return _keep_nothing
        return recorder(
            self.store, latest.facts, chunk.namespace, chunk.model, note_seconds(self.limits), self.sharing.notes
        )


def _keep_nothing() -> None:
    """Of a namespace whose facts are not known any more."""


def chosen_chunk_size(model: torch.nn.Module, chunk_size: int | str) -> int:
    """The number of tokens that is meant; "auto" is by the device (see `arithmetic.chunk_size`).

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


def _forsake(hook: ModelHook, access: Access) -> None:
    """What is left to do when nobody holds the session any more; knows nothing of the session itself.

    The collector calls it, in whatever thread it runs: nothing in here waits. To close tiers may take long.
    """
    hook.detach()
    access.forsake()
