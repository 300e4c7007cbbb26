"""Loads models, tokenizers and documents by name or path, with errors that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cake_hf.assets import RECALL_TINY
from cake_hf.blocks import Block, blocks, checked_cuts
from cake_hf.cache import chat_document
from cake_hf.cli.console import console
from cake_hf.cli.options import WarmedOptions

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


@dataclass(frozen=True)
class Document:
    """A text, and how it becomes tokens; see the options of `cake-hf warm`.

    Attributes:
        text: the text of the document.
        chat: whether it is placed in the model's chat template.
        system: the system prompt; with `chat`.
        tokens: how many tokens to keep, from the start; None for all.
        boundaries: declared cuts, in addition to the end.
    """

    text: str
    chat: bool = False
    system: str = ""
    tokens: int | None = None
    boundaries: Sequence[int] = ()

    def ids(self, tokenizer: Any) -> torch.Tensor:
        """Returns the token ids, `[1, tokens]`.

        Raises:
            CakeError: the tokenizer has no suitable chat template.
            ValueError: a boundary is outside of the tokens.
        """
        if self.chat:
            ids = chat_document(tokenizer, self.text, system=self.system)
        else:
            ids = tokenizer(self.text, return_tensors="pt", verbose=False).input_ids
        ids = ids[:, : self.tokens]
        checked_cuts(self.boundaries, ids.shape[1])
        return ids

    def blocks(self, tokens: int, size: int) -> list[Block]:
        """Returns the chunks and tails of that many tokens, with chunks of that size; the last one may be a tail."""
        return blocks(0, tokens, checked_cuts(self.boundaries, tokens), size)


def read_document(
    path: Path, chat: bool, system: Path | None, tokens: int | None, boundaries: Sequence[int]
) -> Document:
    """Reads the files of a document, which needs no model.

    Raises:
        ValueError: a file cannot be read, or there is a system prompt without `chat`.
    """
    if system is not None and not chat:
        raise ValueError("--system is for --chat: without a chat template there is no system prompt.")
    return Document(read_text(path), chat, "" if system is None else read_text(system), tokens, tuple(boundaries))


def load_with(name: str, documents: Sequence[Document], warmed: WarmedOptions) -> tuple[Any, list[torch.Tensor]]:
    """Loads the model of warmed documents; returns it with their token ids, `[1, tokens]` each.

    Raises:
        CakeError, ValueError: the model cannot be loaded, or a document cannot be turned into ids (see `Document.ids`).
    """
    with console.status("loading the model"):
        tokenizer = load_tokenizer(name)
        ids = [document.ids(tokenizer) for document in documents]
        return load_model(name, warmed.dtype.value, warmed.device), ids


def read_warmed(path: Path, warmed: WarmedOptions) -> Document:
    """Calls `read_document` with these options."""
    return read_document(path, warmed.chat, warmed.system, warmed.tokens, warmed.boundary or ())
