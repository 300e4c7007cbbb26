"""Other weights of the same shape, and an adapter: made on the spot.

python -m benchmarks.shootout.variants GGUF TARGET REVISION|OTHER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

REVISION, OTHER = "revision", "other"
AMOUNT = {REVISION: 0.05, OTHER: 0.5}
"""Noise on each weight, in standard deviations of its tensor."""

NIBBLES = {REVISION: 0x10, OTHER: 0x33}
"""Bits flipped in the 4-bit values of a GGUF file: one step of every second value, or several of all."""

Q4_1_BLOCK, Q4_1_VALUES = 20, 4
"""Bytes of a block of 32 values, and where its values begin behind scale and minimum."""


def other_weights(model: str, target: Path, kind: str) -> str:
    """Writes a model of the same shape with other weights, and returns its folder."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, target, symlinks=False)
    noise = torch.Generator().manual_seed(len(kind))
    for file in sorted(target.glob("*.safetensors")):
        weights = load_file(file)
        for name, weight in weights.items():
            if weight.dim() > 1 and "embed" not in name:
                drawn = torch.randn(weight.shape, generator=noise)
                weights[name] = (weight.float() + AMOUNT[kind] * weight.float().std() * drawn).to(weight.dtype)
        file.unlink()  # it may be a hard link
        save_file(weights, file, metadata={"format": "pt"})
    return str(target)


def adapter(model: str, target: Path) -> str:
    """Writes a LoRA adapter with random weights, and returns its folder."""
    import torch
    from peft import LoraConfig, get_peft_model

    from cake_hf.cli.models import load_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(load_model(model, "float32", "cpu"), config)
    adapted.save_pretrained(target)
    return str(target)


def other_gguf(model: str, target: Path, kind: str) -> None:
    """Writes a GGUF file with other values in its 4-bit layers."""
    import gguf  # type: ignore[import-not-found]  # it is in llama.cpp's environment

    shutil.copyfile(model, target)
    reader = gguf.GGUFReader(str(target), "r+")
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1 and tensor.name.startswith("blk."):
            blocks = tensor.data.reshape(-1, Q4_1_BLOCK)
            blocks[:, Q4_1_VALUES:] ^= NIBBLES[kind]
    reader.data.flush()


if __name__ == "__main__":
    other_gguf(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
