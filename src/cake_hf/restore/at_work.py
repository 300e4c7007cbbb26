"""Which prompts are in the model now: closing cuts none of them off, and waits for none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from cake_hf.model.caller import is_used_by
from cake_hf.util.forks import Lock


class AtWork:
    """The prompts that the caches of one session run at this moment.

    Attributes:
        closing: no new ones are begun.
    """

    def __init__(self) -> None:
        self.closing = False
        self._lock = Lock()
        self._caches: dict[int, tuple[int, Any]] = {}  # by id: the thread, and the cache
        self._then: Callable[[], object] | None = None

    def begin(self, cache: Any) -> bool:
        """A cache begins with a prompt, in this thread; False if the session is being closed."""
        with self._lock:
            if not self.closing:
                self._caches[id(cache)] = threading.get_ident(), cache
            return not self.closing

    def has(self, cache: Any) -> bool:
        """Whether a prompt of that cache is in the model."""
        return id(cache) in self._caches

    def end(self, cache: Any) -> None:
        """Its prompt is through, or given up; any number of times. The last one closes what waits to be closed."""
        with self._lock:
            self._caches.pop(id(cache), None)
            then, self._then = (None, self._then) if self._caches else (self._then, None)
        if then is not None:
            # Its own thread, since closing waits for what is to be saved, and here somebody waits for tokens.
            threading.Thread(target=then, name="cake-close", daemon=True).start()

    def close(self, model: torch.nn.Module, close: Callable[[], object]) -> None:
        """Call `close` now; or, where other threads run prompts, have the last of these call it."""
        with self._lock:
            self.closing = True
            me = threading.get_ident()
            # Who was interrupted (Ctrl-C) has not said so.
            self._caches = {
                number: (thread, cache)
                for number, (thread, cache) in self._caches.items()
                if thread != me and is_used_by(thread, model, cache)
            }
            if self._caches:
                self._then = close
                return
        close()
