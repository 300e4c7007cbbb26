"""Loads models and tokenizers by name or path, with errors that say what to do. Needs none of the command line's libraries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cake_hf.assets import RECALL_TINY

HELP = f"A model's folder, its name on the Hugging Face Hub, or {RECALL_TINY.name}, which comes with the package."

T = TypeVar("T")


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> Any:
    """Loads a causal language model, ready for inference.

    Args:
        name: a folder, or a name on the Hugging Face Hub.
        dtype: one of `options.Dtype`.
        device: as torch names it; "auto" is the GPU if there is one.

    Raises:
        ValueError: there is no such model, or no such device.
    """
    target = find_device(device)
    model = _loaded("model", name, lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=dtype))
    return model.to(target).eval()


def find_device(name: str) -> torch.device:
    """Returns a device by its name; "auto" is the GPU if there is one.

    Raises:
        ValueError: it cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {name!r} cannot be used here; try --device cpu.") from error


def load_config(name: str) -> Any:
    """Loads a model's config, without its weights.

    Raises:
        ValueError: there is none.
    """
    return _loaded("config", name, AutoConfig.from_pretrained)


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer that comes with a model.

    Raises:
        ValueError: there is none.
    """
    return _loaded("tokenizer", name, AutoTokenizer.from_pretrained)


def refuse_too_long(config: Any, tokens: int, advice: str) -> None:
    """Raises an error if a prompt does not fit the model.

    Raises:
        ValueError: the prompt has more tokens than the model has positions.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and tokens > limit:
        raise ValueError(f"The prompt has {tokens:,} tokens, the model was made for {limit:,}; {advice}")


def read_text(path: Path) -> str:
    """Returns the text of a file.

    Raises:
        ValueError: it cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The file {path} cannot be read: {error.strerror}; check the path.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {path} is not UTF-8 text; convert it to plain text first.") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppresses transformers' progress bars, advice and notes of retries, which would tear our tables apart."""
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def find_model(name: str) -> str:
    """Returns the folder that a model's name stands for, or the name itself if it is one on the Hub.

    Raises:
        ValueError: it can only be a folder, and there is none.
    """
    path = Path(name).expanduser()
    path = RECALL_TINY if name == RECALL_TINY.name and not path.is_dir() else path
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no folder {path}; give a model's folder, or its name on the Hugging Face Hub.")
    return name


def _loaded(what: str, name: str, load: Callable[[str], T]) -> T:
    found = find_model(name)
    try:
        with quiet_transformers():
            return load(found)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"The {what} {name!r} cannot be loaded; give a model's folder, or its name on the Hugging Face Hub. ({reason})"
        ) from error
