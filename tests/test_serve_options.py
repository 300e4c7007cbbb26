"""What `cake-hf serve` says where it cannot serve: one sentence each, before it listens."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers.utils import import_utils
from transformers.utils import logging as transformers_logging
from typer.testing import Result

from cake_hf.cli.app import app
from cake_hf.serving import support
from commands import flat, run_command
from http_servers import require_server, save_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def serve(folder: Path, tmp_path: Path) -> Any:
    """Runs the command, which has to end by itself."""
    verbosity = transformers_logging.get_verbosity()

    def run(*options: object, model: object = folder) -> Result:
        store = ("--store", tmp_path / "store", "--chunk-size", 16, "--host", "127.0.0.1", "--device", "cpu")
        return run_command("serve", model, *store, *options)

    yield run
    transformers_logging.set_verbosity(verbosity)


def sentence(result: Result) -> str:
    """What is said of an error: one sentence, no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return flat(result.output)


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")}


def test_all_options_of_transformers_are_there_beside_ours() -> None:
    require_server()
    from transformers.cli.serve import Serve

    theirs = typer.Typer(add_completion=False)
    theirs.command("serve")(Serve)
    command: Any = typer.main.get_command(app)
    ours = command.commands["serve"]
    assert options_of(typer.main.get_command(theirs)) - options_of(ours) == {"--non-blocking"}
    own = {"--store", "--chunk-size", "--salt", "--strategy", "--stall", "--exact", "--save", "--codec"}
    assert options_of(ours) - options_of(typer.main.get_command(theirs)) == own
    defaults = {name: one.default for name, one in inspect.signature(Serve.__init__).parameters.items()}
    assert {one.name: one.default for one in ours.params if one.name in ("host", "port", "dtype", "log_level")} == {
        name: defaults[name] for name in ("host", "port", "dtype", "log_level")
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-continuous-batching"], "restores in continuous batching only"),
        (["--stall", 0], "stall is a share of the steps"),
        (["--stall", "nan"], "stall is a share of the steps"),
        (["--cb-block-size", 32], "page_size is 32 tokens, and chunks have 16"),
        (["--cb-max-batch-tokens", 8], "max_batch_tokens is 8, less than a chunk"),
        (["--cb-num-blocks", 1], "num_blocks is 1"),
        (["--log-level", "loud"], "transformers cannot serve"),
        (["--dtype", "float7"], "Unsupported dtype: 'float7'"),
        (["--attn-implementation", "guess"], "Unsupported attention implementation: 'guess'"),
        (["--attn-implementation", "flex_attention"], "not supported for continuous batching"),
        (["--quantization", "bnb-3bit"], "Unsupported quantization"),
        (["--chat-template-kwargs", "{"], "Expecting property name"),
        (["--chat-template-kwargs", "[]"], "must be a JSON object"),
        (["--store", "nonsense://"], "Unknown store URL"),
    ],
)
def test_options_that_cannot_be_used(options: list[Any], words: str, serve: Callable[..., Result]) -> None:
    require_server()
    assert words in sentence(serve(*options))


def test_our_options_reach_the_manager(serve: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    require_server()
    from cake_hf.serving import manager

    seen: dict[str, Any] = {}

    class Recorder:
        def __init__(self, model: Any, store: Any, **options: Any) -> None:
            seen.update(options)
            raise ValueError("that was all")

    monkeypatch.setattr(manager, "BatchingManager", Recorder)
    ours = ("--salt", "mine", "--strategy", "load", "--stall", 0.25, "--no-exact", "--no-save", "--codec", "lossless")
    assert "that was all" in sentence(serve(*ours, "--cb-num-blocks", 9, "--cb-max-batch-tokens", 64))
    config, generation = seen.pop("continuous_batching_config"), seen.pop("generation_config")
    assert (config.page_size, config.num_blocks, config.max_batch_tokens) == (16, 9, 64)
    assert generation.eos_token_id == 2
    assert seen == {
        "chunk_size": 16, "salt": "mine", "save": False, "exact": False, "strategy": "load", "stall": 0.25, "codec": "lossless"
    }  # fmt: skip


@pytest.mark.parametrize("model", ["/no/such/folder", "./nor-this-one", "~/nor-that"])
def test_a_model_that_is_not_there(model: str, serve: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    require_server()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "There is no folder" in sentence(serve(model=model))


def test_a_folder_without_a_model(serve: Callable[..., Result], tmp_path: Path) -> None:
    require_server()
    assert "transformers cannot serve" in sentence(serve(model=tmp_path))


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "openai"])
def test_packages_that_are_missing_are_named(
    package: str, serve: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fastapi", "uvicorn", "openai"):
        monkeypatch.setattr(import_utils, f"is_{name}_available", lambda name=name: name != package, raising=False)
    if not support.is_older_than(support.OLDEST):
        assert f'The server needs {package}: pip install "cake-hf[serve]"' in sentence(serve())


def test_an_older_transformers_is_named(serve: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "is_older_than", lambda version: True)
    assert "needs transformers 5.20 or newer" in sentence(serve())


def without_start(serve: Any) -> None:
    del serve.start_server


def with_other_parameters(serve: Any) -> None:
    serve.__init__ = lambda self, **anything: None


def with_other_attributes(serve: Any) -> None:
    made = serve.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        del self._generation_state

    init.__signature__ = inspect.signature(made)  # type: ignore[attr-defined]
    serve.__init__ = init


@pytest.mark.parametrize("change", [without_start, with_other_parameters, with_other_attributes])
def test_a_server_that_is_not_known_is_not_used(
    change: Callable[[Any], None], serve: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_server()
    from transformers.cli import serve as module

    changed = type("Serve", (), dict(module.Serve.__dict__))
    change(changed)
    monkeypatch.setattr(module, "Serve", changed)
    assert "is not as cake-hf knows it" in sentence(serve())


def test_a_model_that_is_not_served_in_continuous_batching(
    serve: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_server()
    from transformers.cli.serving.utils import GenerationState

    monkeypatch.setattr(GenerationState, "use_continuous_batching", lambda self, model, modality: False)
    assert "in continuous batching, so nothing of its prompts could be restored" in sentence(serve())


def test_a_port_that_is_taken(serve: Callable[..., Result]) -> None:
    require_server()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = serve("--port", taken.getsockname()[1], "--cb-num-blocks", 64)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_it_is_in_the_list_of_commands() -> None:
    assert "serve" in run_command("--help").output
    assert "--store" in run_command("serve", "--help").output
