"""Which prompts the model is running now: closing neither interrupts them nor waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from cake_hf.model.caller import is_used_by
from cake_hf.util.forks import Lock


class AtWork:
    """The prompts that the caches of one session are running.

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

    def has(self, cache: Any) -> bool:
        """Whether a prompt of that cache is in the model."""
        return id(cache) in self._caches

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
