"""Which thread uses a cache. Threads may take turns; two at once would change the cache while the other relies on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch

from cake_hf.errors import CakeError
from cake_hf.model.caller import is_used_by
from cake_hf.util.forks import Lock

_lock = Lock()


class User:
    """The thread that used a cache last."""

    def __init__(self) -> None:
        self._thread = 0
        self._copying = Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> User:
        """Returns a new `User`, since a copy of a cache has not been used yet."""
        return User()

    @property
    def is_here(self) -> bool:
        """Whether that thread is the calling one."""
        return self._thread == get_ident()

    def claim(self, model: torch.nn.Module, cache: Any) -> None:
        """Makes the calling thread the user of the cache from now on.

        Args:
            model: whose forward, or `generate`, is called with the cache.
            cache: whose user this is.

        Raises:
            CakeError: another thread is still using it.
        """
        if self.is_here:
            return
        with _lock:
            self._require_idle(model, cache)
            self._thread = get_ident()

    @contextmanager
    def copying(self, model: torch.nn.Module, cache: Any) -> Iterator[None]:
        """Guards a copy of the cache's content; any number of threads may copy it, one after another.

        Args:
            model: of the cache.
            cache: whose user this is.

        Raises:
            CakeError: another thread is changing the content.
        """
        with self._copying:
            if not self.is_here:
                self._require_idle(model, cache)
            yield

    def _require_idle(self, model: torch.nn.Module, cache: Any) -> None:
        if self._thread and is_used_by(self._thread, model, cache):
            raise CakeError("Another thread is using this CakeCache; make one for each thread.")
