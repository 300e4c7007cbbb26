"""The manager: transformers' `ContinuousBatchingManager`, whose requests' prefixes come from a store and go to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from cake_hf.cache.self_check import checked_layers
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.errors import CakeError
from cake_hf.limits import Limits
from cake_hf.model.which_model import resolve_model
from cake_hf.report import Refusal, Report
from cake_hf.restore.session import Session
from cake_hf.restore.support import refuse_unusable
from cake_hf.scheduling.frontier import Strategy
from cake_hf.serving.audit import EngineAudit, Saver
from cake_hf.serving.beliefs import Beliefs
from cake_hf.serving.loads import Blocks, Loaders
from cake_hf.serving.matching import Matching, computes_as_generate
from cake_hf.serving.requests import Requests
from cake_hf.serving.restorer import Restorer
from cake_hf.serving.seams import Engine, EngineManager, Hooks, complete_config, generation_config_of, lend_to, no_room
from cake_hf.serving.support import attention_refusal, engine_refusal, refuse_lossy
from cake_hf.serving.watcher import Watcher
from cake_hf.serving.windows import Windows
from cake_hf.stores.base import Store
from cake_hf.stores.opening import StoreSpec

logger = logging.getLogger("cake_hf")


class BatchingManager(EngineManager):
    """A `ContinuousBatchingManager` that restores the prefixes of its requests; `batching` documents the arguments.

    Attributes:
        store: where chunks are kept.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        store: StoreSpec | None = None,
        *,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
        chunk_size: int = 512,
        salt: str = "",
        save: bool = True,
        exact: bool = True,
        strategy: str = "both",
        stall: float = 0.5,
        limits: Limits | None = None,
        codec: str = "none",
        max_ttft: float | None = None,
    ) -> None:
        sides = Strategy(strategy)
        refuse_lossy(codec, max_ttft)
        if not 0 < stall <= 1:
            raise ValueError(f"stall is a share of the steps, above 0 and at most 1; got {stall!r}.")
        model = resolve_model(model, store)
        refuse_unusable(model)
        config = complete_config(continuous_batching_config, chunk_size)
        super().__init__(model, generation_config_of(model, generation_config), config, workload_hints)
        self._stall, self._closed = stall, False
        try:
            layers, self._model_refusal = checked_layers(model)
            self._session = Session(
                model,
                store,
                chunk_size=chunk_size,
                salt=salt,
                save=save,
                exact=exact,
                strategy=sides,
                limits=limits or Limits.from_environment(),
                codec=codec,
            )
        except BaseException:
            self.restore_attention()
            raise
        self._beliefs = Beliefs()
        self._matching = Matching(self._session, layers, self._beliefs)
        self._requests = Requests(self._session, self._look_up, self.clock)
        self._loaders: Loaders | None = None
        self._restorer: Restorer | None = None
        self._release = lend_to(model, self)

    def clock(self) -> float:
        """Returns monotonic seconds: of everything but the length of a step."""
        return time.monotonic()

    @property
    def store(self) -> Store:
        """The store behind this manager."""
        return self._session.bound_store.store

    @property
    def limits(self) -> Limits:
        """The budgets of threads, seconds and bytes."""
        return self._session.limits

    def add_request(
        self, input_ids: Sequence[int], request_id: str | None = None, *args: Any, **kwargs: Any
    ) -> str | None:
        """Adds a request, as in transformers; finding out what is stored of its prompt begins at once, in the background.

        An answer ends where the engine's memory does, even if `max_new_tokens` is more.

        Raises:
            CakeError: the manager is closed.
            ValueError: the prompt is empty, longer than the engine's memory or has ids that the model does not have, or a
                request of that id is under way.
        """
        if self._closed:
            raise CakeError("This manager is closed; make a new one with cake_hf.batching.")
        if not len(input_ids):  # it would end the engine, and with it all other requests
            raise ValueError("The prompt has no tokens; give at least one.")
        room = self.tokens_in_memory
        if room is not None and len(input_ids) >= room:
            raise ValueError(no_room(len(input_ids), room))
        size = self.model.get_input_embeddings().weight.shape[0]
        if min(input_ids) < 0 or max(input_ids) >= size:  # the step would fail, and the engine with it
            raise ValueError(
                f"The prompt has a token id that the model does not have; ids are from 0 to {size - 1}. Is it another model's "
                "tokenizer?"
            )
        request_id = self.next_id() if request_id is None else request_id
        waits = self._requests.known(request_id) is not None
        if waits or self.is_under_way(request_id):  # the engine would mix their KV
            raise ValueError(f"A request {request_id!r} is under way; give each one an id of its own.")
        self._requests.open(request_id, input_ids, self.num_return_sequences - 1)
        try:
            added: str | None = super().add_request(input_ids, request_id, *args, **kwargs)
        except BaseException:
            self._requests.drop(request_id)
            raise
        if added is None:
            self._requests.drop(request_id)
        return added

    def report(self, request_id: str) -> Report | None:
        """Returns what happened to a request's prompt; None if the request is not known, or was one of too long ago.

        `prefill_seconds` is the time from `add_request` to the first token of the answer.
        """
        return self._requests.report(request_id)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all chunks to be saved are durable; returns False if `timeout` seconds were not enough."""
        return self._session.flush(timeout)

    def close(self) -> None:
        """Stops the engine, saves queued chunks (waiting at most `limits.exit_flush_seconds`), and releases model and store.

        Requests that are under way are finished first. Idempotent.
        """
        if self._closed:
            return
        self._closed = True
        self._release()
        if self.is_running():
            self.stop(block=True)
        self.restore_attention()
        self.engine_gone()
        self._requests.desk.wait(self._session.limits.exit_flush_seconds)
        self._session.close()

    def hooks_for(self, engine: Engine) -> Hooks | None:
        """See `EngineManager`."""
        try:
            return self._hooks_for(engine)
        except Exception as error:
            logger.warning("Nothing is restored in continuous batching. %s", error)
            text = f"restoring in continuous batching could not be set up: {error}"
            self._matching.refusal = Refusal("engine-setup", text)
            self._requests.desk.open()
            return None

    def loaders_for(self, layout: ChunkLayout, blocks: Blocks, windows: Windows) -> Loaders:
        """Returns what loads for an engine."""
        device = torch.device(self.model.device)
        return Loaders(self._session.bound_store, layout, blocks, windows, self._beliefs, device, self.wake, self.clock)

    def engine_gone(self) -> None:
        """See `EngineManager`."""
        if self._loaders is not None:
            self._loaders.stop()
        self._loaders = self._restorer = None

    def model_changed(self) -> None:
        """See `EngineManager`."""
        if self._restorer is not None:
            self._restorer.model_changed()

    def _hooks_for(self, engine: Engine) -> Hooks:
        session, model = self._session, self._session.model
        refusal = self._model_refusal or attention_refusal(model)
        layout = None if refusal else session.bound_model.layout()
        if layout is not None:
            refusal = engine_refusal(engine, layout)
        self._matching.refusal = refusal
        if layout is None or refusal:
            self._requests.desk.open()
            return Watcher(self._requests)
        if session.exact:
            self._matching.apart = {} if computes_as_generate(model, engine, layout) else engine.metadata()
        saver, windows = Saver(session, engine, layout), Windows(engine, layout)
        self.engine_gone()
        self._loaders = self.loaders_for(layout, saver.blocks, windows)
        self._restorer = Restorer(
            session,
            engine,
            self._requests,
            self._loaders,
            windows,
            EngineAudit(session, layout, saver, self.wake),
            self._beliefs,
            stall=self._stall,
            stepped_seconds=lambda: self.stepped_seconds,
            clock=self.clock,
        )
        self._requests.desk.open()
        return self._restorer

    def _look_up(self, restores: list[Any]) -> None:
        self._matching.look_up(restores)
        self.wake()
