"""`cake-hf serve`: transformers' OpenAI-compatible server, whose prompts are restored from a store."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import OptionInfo

from cake_hf.cli.console import FAILED, console
from cake_hf.cli.keeping import said_of_new
from cake_hf.cli.models import HELP as MODEL
from cake_hf.cli.models import find_model
from cake_hf.cli.options import ChunkSize, Codec, flat_options
from cake_hf.cli.server_seams import Make, Server, missing_packages, options_of_transformers
from cake_hf.errors import CakeError
from cake_hf.scheduling.frontier import Strategy
from cake_hf.scheduling.planner import auto_chunk_size
from cake_hf.serving.support import refuse_lossy, require_engine
from cake_hf.stores.base import Store
from cake_hf.stores.opening import open_store
from cake_hf.util.environment import STORE
from cake_hf.util.redaction import shown_url

REPORTS = "/cake_hf/reports/{request_id}"
"""Where the server tells what happened to a request's prompt; the id is the answer's header `x-request-id`."""


@dataclass(frozen=True)
class Restoring:
    """How prompts are restored; see `cake_hf.batching`."""

    store: Annotated[str, typer.Option(envvar=STORE, help="Where the KV is: a directory (made when missing) or a URL.")]
    chunk_size: ChunkSize = None
    salt: Annotated[str, typer.Option(help="Separates tenants: only prompts with the same salt find the KV.")] = ""
    strategy: Annotated[
        Strategy, typer.Option(help="Compute from the front while loading from the back, or only one of the two.")
    ] = Strategy.BOTH
    stall: Annotated[
        float,
        typer.Option(help="While requests decode, at most this share of the steps computes one prompt's KV alone."),
    ] = 0.5
    exact: Annotated[
        bool, typer.Option(help="KV is bit for bit that of generate with the same chunk size; only such KV is used.")
    ] = True
    save: Annotated[bool, typer.Option(help="Save the KV of new prompts.")] = True
    codec: Annotated[Codec, typer.Option(help="How the KV of new prompts is stored: none, lossless or auto.")] = (
        Codec.NONE
    )


def _with_options_of_transformers(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it: `**transformers` is given as the options of `transformers serve`."""
    signature = inspect.signature(command)
    parameters = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    known = {one.name for one in parameters}
    for theirs in options_of_transformers():
        if theirs.name not in known:
            default = True if theirs.name == "continuous_batching" else theirs.default
            annotation = _in_their_panel(theirs.annotation)
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(theirs.replace(kind=keyword, default=default, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what `flat_options` goes by
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _in_their_panel(annotation: Any) -> Any:
    kind, *about = get_args(annotation)
    about = [copy.copy(one) for one in about]
    for one in about:
        if isinstance(one, OptionInfo):
            one.rich_help_panel = "Options of transformers serve"
    return Annotated[(kind, *about)]


@flat_options
@_with_options_of_transformers
def serve_command(model: Annotated[str, typer.Argument(help=MODEL)], restoring: Restoring, **transformers: Any) -> None:
    """Serve a model through an OpenAI-compatible API, and restore its prompts from a store.

    This is `transformers serve` with continuous batching, and takes all of
    its options. The KV of prompts is kept in the store, so that prompts that
    begin alike need not be computed again, also after a restart, and in
    other servers with the same store. Ctrl-C and SIGTERM finish the answers
    under way, and the saving.

    GET /cake_hf/reports/ID says what was restored of a request; ID is the
    header x-request-id of its answer.
    """
    require_engine()
    if missing := missing_packages():
        raise CakeError(f'The server needs {", ".join(missing)}: pip install "cake-hf[serve]"')
    if not transformers.get("continuous_batching", True):
        raise ValueError("cake-hf serve restores in continuous batching only; leave --no-continuous-batching out.")
    refuse_lossy(restoring.codec.value)
    model = _found(model)
    if told := said_of_new(restoring.store):
        console.print(told, style="dim")
    with open_store(restoring.store) as store:
        server = make_server(model, store, restoring, transformers)
        try:
            server.run(lambda: console.print(f"Serving {model} at /v1, with KV in {shown_url(restoring.store)}"))
        except SystemExit as error:  # uvicorn has said why
            raise typer.Exit(FAILED) from error


def make_server(model: str, store: Store, restoring: Restoring, transformers: Mapping[str, Any]) -> Server:
    """Returns a server that does not listen yet.

    Raises:
        CakeError: the model cannot be served.
        ValueError: an option cannot be used, or there is no such model.
    """
    server = Server(model, transformers, _maker(store, restoring, transformers))
    server.app.add_api_route(REPORTS, _reports_of(server), methods=["GET"])
    return server


def _maker(store: Store, restoring: Restoring, transformers: Mapping[str, Any]) -> Make:
    from cake_hf.serving.manager import BatchingManager

    def make(model: Any, generation_config: Any, batching_config: Any) -> BatchingManager:
        size = restoring.chunk_size or auto_chunk_size(model.device.type)
        if batching_config is not None and transformers.get("cb_block_size") is None:
            batching_config.page_size = size
        return BatchingManager(
            model,
            store,
            generation_config=generation_config,
            continuous_batching_config=batching_config,
            chunk_size=size,
            salt=restoring.salt,
            save=restoring.save,
            exact=restoring.exact,
            strategy=restoring.strategy,
            stall=restoring.stall,
            codec=restoring.codec.value,
        )

    return make


def _reports_of(server: Server) -> Callable[[str], Any]:
    from fastapi import HTTPException

    def report(request_id: str) -> dict[str, Any]:
        found = server.manager.report(request_id)
        if found is None:
            raise HTTPException(404, f"No report of a request {request_id!r} is kept.")
        return found.as_dict()

    return report


def _found(model: str) -> str:
    """The model as transformers is to be told; behind its name may stand a revision (@), and a file of weights (:).

    Raises:
        ValueError: there is no such folder.
    """
    if Path(model).expanduser().is_dir():
        return str(Path(model).expanduser())
    name = re.split("[@:]", model)[0]
    return find_model(name) + model[len(name) :]
