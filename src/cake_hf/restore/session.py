"""A session is shared by a cache and its copies: a bound model, a bound store, and the settings of both."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from cake_hf.limits import Limits
from cake_hf.model.caller import is_used_by
from cake_hf.restore.bound_model import BoundModel, chosen_chunk_size
from cake_hf.restore.bound_store import BoundStore
from cake_hf.restore.hook import ModelHook
from cake_hf.scheduling.frontier import Strategy
from cake_hf.scheduling.pace import Rules
from cake_hf.stores.opening import StoreSpec
from cake_hf.transfer.cost_notes import CostMemory
from cake_hf.transfer.deadline import WaitBudget
from cake_hf.transfer.store_access import Access
from cake_hf.util.forks import Lock

__all__ = ["Session", "chosen_chunk_size"]


class Session:
    """The long-lived half of a `CakeCache`, which documents the arguments.

    Attributes:
        bound_model: the model, with the hook on it.
        bound_store: the store, with the queue in front of it.
        model, chunk_size, exact, salt, strategy, limits, snapshot_every: as for `CakeCache`.
        rules: the rules of the restores.
        at_work: the prompts that are running now.
        is_closed: as `closed`; a plain attribute, which torch.compile can trace.
    """

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
        codec: str = "none",
        compiled: Any = None,
        rules: Rules | None = None,
    ) -> None:
        chunk_size = chosen_chunk_size(model, chunk_size)
        self.model = model
        self.chunk_size = chunk_size
        self.salt = salt
        self.exact = exact
        self.strategy = strategy
        self.limits = limits
        self.snapshot_every = snapshot_every
        self.rules = rules or Rules()
        self.is_closed = False
        self.at_work = AtWork()
        self.bound_store = BoundStore(store, limits, save=save, codec=codec)
        self.bound_model = BoundModel(
            model,
            chunk_size=chunk_size,
            salt=salt,
            exact=exact,
            reference_place=self.bound_store.reference_place,
            lossy=self.bound_store.lossy,
            compiled=compiled,
        )
        # For when the last cache of this session is gone without a call of `close`.
        self._release = weakref.finalize(self, _forsake, self.bound_model.hook, self.bound_store.access)
        self._release.atexit = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._release.alive

    def flush(self, timeout: float | None) -> bool:
        """Waits until everything to be saved is durable; returns False on time-out."""
        return self.bound_store.access.flush(timeout)

    def close(self) -> bool:
        """Removes the hook, saves what is queued, and closes the store if it is ours; returns False on time-out.

        One time limit covers all of it.
        """
        self.is_closed = True
        if not self._release.detach():
            return True
        self.bound_model.hook.detach()
        return self.bound_store.close(self.limits.exit_flush_seconds)

    def wait_budget(self) -> WaitBudget:
        """Returns the budget of a new prompt: what the longest of its waits for the store may take."""
        return WaitBudget(max(self.limits.read_timeout, self.limits.lookup_timeout))

    def cost_memory(self, namespace: str) -> CostMemory:
        """Returns what computing and loading cost with this model, device and store."""
        return self.bound_store.cost_memory(namespace, self.bound_model.where_computed())


def _forsake(hook: ModelHook, access: Access) -> None:
    """Releases hook and store once the session itself is gone; must not refer to the session.

    The garbage collector calls this, in whatever thread it runs, so nothing here waits: closing tiers may take long.
    """
    hook.detach()
    access.forsake()


class AtWork:
    """The prompts that the caches of one session are running. Closing neither interrupts them nor waits for them.

    Attributes:
        closing: no new ones are started.
    """

    def __init__(self) -> None:
        self.closing = False
        self._lock = Lock()
        self._caches: dict[int, tuple[int, Any]] = {}  # by id: the thread, and the cache
        self._then: Callable[[], object] | None = None

    def begin(self, cache: Any) -> bool:
        """Registers a prompt of a cache, in this thread; returns False if the session is being closed."""
        with self._lock:
            if not self.closing:
                self._caches[id(cache)] = threading.get_ident(), cache
            return not self.closing

    def end(self, cache: Any) -> None:
        """Removes a cache whose prompt has run, or was given up; idempotent. The last one runs a `close` that was put off."""
        with self._lock:
            self._caches.pop(id(cache), None)
            then, self._then = (None, self._then) if self._caches else (self._then, None)
        if then is not None:
            # In a thread of its own: closing waits for saves, while the caller here waits for tokens.
            threading.Thread(target=then, name="cake-close", daemon=True).start()

    def close(self, model: torch.nn.Module, close: Callable[[], object]) -> None:
        """Calls `close` now; or, if other threads are running prompts, has the last of these call it."""
        with self._lock:
            self.closing = True
            me = threading.get_ident()
            # A thread that was interrupted (Ctrl-C) has not called `end`.
            self._caches = {
                number: (thread, cache)
                for number, (thread, cache) in self._caches.items()
                if thread != me and is_used_by(thread, model, cache)
            }
            if self._caches:
                self._then = close
                return
        close()
