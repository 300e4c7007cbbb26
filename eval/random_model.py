"""`python -m eval.random_model FOLDER`: a Llama of about 100 million random weights, to try the harness on without the Hub.

Nothing it writes makes sense, but the laws of exactness hold for it as for any other. Its logits are nearly level, so
near ties are far more frequent than with trained weights: the hard case for low precision. The tokenizer is that of the
package's small model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cake_hf.assets import RECALL_TINY
from cake_hf.cli.models import load_tokenizer, quiet_transformers


def make_model(folder: Path, *, dtype: str = "float32", layers: int = 16, seed: int = 0) -> int:
    """Saves model and tokenizer into a folder; the same ones for equal arguments.

    Returns:
        The number of weights.
    """
    tokenizer = load_tokenizer(str(RECALL_TINY))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.random_model", description="A Llama with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", type=int, default=16, help="16 make 100 million weights")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    folder = options.pop("folder")
    print(f"{make_model(folder, **options) / 1e6:.0f} million weights in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
