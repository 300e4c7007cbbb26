"""Watches an engine's requests without restoring any: for their reports, and as the base of what does restore them."""

from __future__ import annotations

import logging

from cake_hf.serving.requests import Requests
from cake_hf.serving.restore import Restore
from cake_hf.serving.seams import RequestState, Step
from cake_hf.transfer.telemetry import FaultLog

logger = logging.getLogger("cake_hf")


class Watcher:
    """Hooks of an engine (`seams.Hooks`) that note when the first token of each answer comes."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._awaited: dict[str, Restore] = {}
        self._faults = FaultLog()

    def arrived(self, state: RequestState) -> None:
        """See `Hooks`."""
        try:
            restore = self._requests.known(state.request_id)
            if restore is None or restore.state is not None or restore.tokens != state.initial_tokens:
                restore = self._requests.open(
                    state.request_id,
                    state.initial_tokens,
                    state.num_children,
                    again=True,
                    kept=state.is_cpu_offloaded,
                )
            restore.state = state
            if not restore.first_token:
                self._awaited[state.request_id] = restore
        except Exception as error:
            self._tell(error)

    def ended(self, request_id: str) -> None:
        """See `Hooks`."""
        try:
            self._look_for_first_tokens()
            self._awaited.pop(request_id, None)
            restore = self._requests.drop(request_id)
            if restore is not None:
                self._finish(restore)
        except Exception as error:
            self._tell(error)

    def plan(self) -> Step:
        """See `Hooks`."""
        try:
            self._look_for_first_tokens()
        except Exception as error:
            self._tell(error)
        return Step()

    def reset(self) -> None:
        """See `Hooks`."""
        self._awaited.clear()

    def _finish(self, restore: Restore) -> None:
        """Ends what is done for a request; the engine goes on with it."""
        restore.over()

    def _look_for_first_tokens(self) -> None:
        for name, restore in list(self._awaited.items()):
            if restore.state is not None and restore.state.generated_tokens:
                del self._awaited[name]
                self._requests.first_token_came(restore)

    def _tell(self, error: Exception) -> None:
        self._faults.tell(
            type(error).__name__, "A request is not restored any further, and goes on plainly. %s", repr(error)
        )
