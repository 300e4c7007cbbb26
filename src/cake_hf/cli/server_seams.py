"""Everything that is private in transformers' server, and that we depend on. No other file names any of it.

The server makes a manager of continuous batching with the first request (`CBGenerateManager.init_cb`), since it takes the
sampling options of all requests from that one. Ours is put in there; all else of the server is as transformers has it. Tried
with transformers 5.20 and 5.24.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cake_hf.errors import CakeError
from cake_hf.layers.compat import installed_version

if TYPE_CHECKING:
    from cake_hf.serving.manager import BatchingManager

OURS = ("self", "force_model", "non_blocking")
"""Parameters of `transformers serve` that are not options of the user's."""

PER_REQUEST = {"max_new_tokens", "eos_token_id", "use_cache"}
"""What of a generation configuration is a request's own, or says nothing about its tokens."""

OF_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
"""What of it says nothing where the most likely token is taken."""

Make = Callable[[Any, Any, Any], "BatchingManager"]
"""Makes a manager that has not been started, of a model, a generation configuration, and one of continuous batching or None."""


def options_of_transformers() -> list[inspect.Parameter]:
    """Returns the options of `transformers serve`, with typer's annotations; none if this version has no such command."""
    try:
        from transformers.cli.serve import Serve
    except ImportError:
        return []
    return [one for name, one in inspect.signature(Serve.__init__).parameters.items() if name not in OURS]


def missing_packages() -> list[str]:
    """Returns the packages that the server needs and that are not installed."""
    from transformers.utils import import_utils

    checks = {name: getattr(import_utils, f"is_{name}_available") for name in ("fastapi", "uvicorn", "openai")}
    return [name for name, is_there in checks.items() if not is_there()]


class Server:
    """transformers' server for one model, with the managers that `make` makes.

    Attributes:
        app: the FastAPI application.
        manager: that answers now.

    Raises:
        CakeError: transformers' server is not as we know it, or does not serve this model in continuous batching.
        ValueError: transformers does not start with this model and these options; or what `make` raises.
    """

    def __init__(self, model: str, options: Mapping[str, Any], make: Make) -> None:
        serve = _made(model, options)
        try:
            state, models, self._server = serve._generation_state, serve._model_manager, serve.server
            name, loaded, processor = serve._chat_handler._resolve_model({})
            is_batched = state.use_continuous_batching(loaded, models.get_model_modality(loaded, processor=processor))
            self.app = self._server.config.app
            self._shut_down = self._server.shutdown
        except AttributeError as error:
            raise _unknown_server(error) from error
        if not is_batched:
            raise CakeError(
                f"transformers does not serve {model} in continuous batching, so nothing of its prompts could be restored; "
                "run transformers serve."
            )
        self._make, self._batching = make, state._cb_config
        self.manager = self._new_manager(loaded, loaded.generation_config)
        self._sampling = _sampling(loaded.generation_config)
        self._is_chosen = False
        self._server.shutdown = self._end
        self.app.add_exception_handler(Refused, _tell_client)
        state._cb_manager, state._cb_model_id = _restoring_manager(self), name

    def run(self, ready: Callable[[], object] | None = None) -> None:
        """Serves until `stop`, or a signal, and then closes the manager: what is to be saved becomes durable.

        Args:
            ready: called when the model can be asked, just before the server listens.
        """
        try:
            self._start()
            if ready is not None:
                ready()
            with _signals_end_it_once():
                self._server.run()
        finally:
            self._halt()
            self.manager.close()

    def stop(self) -> None:
        """Ends `run`: no new requests are taken, and those under way are finished. Any thread may call it."""
        self._server.should_exit = True

    @property
    def ports(self) -> list[int]:
        """The ports on which the server listens; empty if it does not."""
        listening = getattr(self._server, "servers", []) if self._server.started else []
        return [socket.getsockname()[1] for server in listening for socket in server.sockets]

    def choose(self, model: Any, config: Any) -> Any:
        """Returns the manager for all requests, of which this is the first one's generation configuration."""
        sampling = _sampling(config)
        if not self._is_chosen and sampling != self._sampling:
            self.manager.close()
            self.manager, self._sampling = self._new_manager(model, config), sampling
            self._start()
        self._is_chosen = True
        return self.manager

    def _new_manager(self, model: Any, config: Any) -> BatchingManager:
        return self._make(model, config, copy.copy(self._batching))

    def _start(self) -> None:
        self.manager.warmup()
        self.manager.start()

    async def _end(self, *args: Any, **kwargs: Any) -> None:
        """Ends the connections, so that no client waits for an answer, while the loop still takes the last answers."""
        await self._shut_down(*args, **kwargs)
        await asyncio.to_thread(self._halt)

    def _halt(self) -> None:
        if self.manager.is_running():
            self.manager.stop(block=True, hard_stop=True)


def _made(model: str, options: Mapping[str, Any]) -> Any:
    """Returns transformers' server with the model loaded, before it listens."""
    try:
        from transformers.cli.serve import Serve

        class Unstarted(Serve):  # type: ignore[misc]  # transformers has no types here
            def start_server(self) -> None:
                """Instead of listening in a thread."""

        if not {"force_model", "continuous_batching", "non_blocking"} <= set(inspect.signature(Serve).parameters):
            raise AttributeError("other parameters")
        Serve.start_server  # noqa: B018  # an AttributeError if there is none
    except (ImportError, AttributeError) as error:
        raise _unknown_server(error) from error
    try:
        return Unstarted(force_model=model, **{**options, "continuous_batching": True, "non_blocking": True})
    except (OSError, ImportError, LookupError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"transformers cannot serve {model!r} with these options. ({reason})") from error


def _unknown_server(error: Exception) -> CakeError:
    return CakeError(
        f"The server of transformers {installed_version()} is not as cake-hf knows it ({error}); use another version of "
        "transformers, or cake_hf.batching."
    )


def _sampling(config: Any) -> dict[str, Any]:
    """Returns what of a generation configuration holds for all requests."""
    without_effect = PER_REQUEST if config.do_sample else PER_REQUEST | OF_SAMPLING
    about = {**config.to_dict(), "do_sample": bool(config.do_sample)}
    return {name: value for name, value in about.items() if name not in without_effect and value is not None}


def _restoring_manager(server: Server) -> Any:
    from transformers.cli.serving.utils import CBGenerateManager

    class RestoringManager(CBGenerateManager):  # type: ignore[misc]
        """The manager behind the server's endpoints. Requests that would end the engine are refused, or made shorter."""

        def __init__(self) -> None:
            super().__init__()
            self._cb = server.manager
            self._under_way: set[str] = set()

        def init_cb(self, model: Any, gen_config: Any) -> None:
            self._cb = server.choose(model, copy.deepcopy(gen_config))

        def generate_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **rest: Any
        ) -> Any:
            with self._admitted(inputs, gen_config, request_id):
                pieces, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, **rest)
            streamer.end, streamer.cancel = (
                self._then_over(request_id, one) for one in (streamer.end, streamer.cancel)
            )
            return pieces, streamer

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **rest: Any
        ) -> Any:
            with self._admitted(inputs, gen_config, request_id):
                found = await super().generate_non_streaming(model, processor, inputs, gen_config, request_id, **rest)
            self._under_way.discard(request_id)
            return found

        @contextmanager
        def _admitted(self, inputs: Any, gen_config: Any, request_id: str) -> Iterator[None]:
            self._admit(inputs, gen_config, request_id)
            try:
                yield
            except BaseException as error:
                self._under_way.discard(request_id)
                if isinstance(error, ValueError):
                    raise Refused(str(error)) from error
                raise

        def _admit(self, inputs: Any, gen_config: Any, request_id: str) -> None:
            tokens, room = len(inputs["input_ids"]), self._cb.tokens_in_memory
            if not tokens:
                raise Refused("The prompt is empty; give at least one token.")
            if request_id in self._under_way:  # its answer would go to the other one's client
                raise Refused(f"A request {request_id!r} is under way; give each one an id of its own.")
            if gen_config.max_new_tokens is not None and gen_config.max_new_tokens < 1:
                raise Refused(f"max_tokens is at least 1; got {gen_config.max_new_tokens}.")
            if room is not None and gen_config.max_new_tokens is not None and tokens < room:
                gen_config.max_new_tokens = min(gen_config.max_new_tokens, room - tokens)
            self._under_way.add(request_id)

        def _then_over(self, request_id: str, call: Callable[[], None]) -> Callable[[], None]:
            def over() -> None:
                self._under_way.discard(request_id)
                call()

            return over

    return RestoringManager()


class Refused(Exception):
    """A request that cannot be answered; the message says why."""


async def _tell_client(request: Any, error: Any) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)


@contextmanager
def _signals_end_it_once() -> Iterator[None]:
    """Keeps the signals that end the server, which uvicorn sends again when it has ended, from ending what comes after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *about: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
