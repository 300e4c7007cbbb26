"""`python -m eval.methods.vision`: the presses for prompts with images, on a restored prompt with two images.

The model is tiny and its weights are random, so nothing is said about answers: the table has what each method keeps, and how
far attention is from that on all KV. Attention is sharper from layer to layer, so that layers differ in how sparse it is.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from cake_hf import CakeCache
from cake_hf.layers.compat import for_generate
from cake_hf.presses import LESS, ElasticCache, Press, VLCache
from eval.methods.tables import fill, markdown

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "eval" / "results" / "methods" / "vision.json"
IMAGE, VOCABULARY = 250, 256
LAYERS, SHARPEST = 6, 300.0
SIDE, PATCH = 48, 4
TEXT = (60, 40, 30)
"""Tokens of text before, between and behind the images."""
KEEPS = (0.5, 0.25, 0.1)


def presses(keep: float) -> Mapping[str, Press]:
    """Returns the methods that are compared at a budget, a share of the entries."""
    return {"VLCache": VLCache(1 - keep), "ElasticCache": ElasticCache(1 - keep), "eviction alone": LESS([], keep)}


def main() -> int:
    """Measures, writes the result and fills docs/methods.md; returns the exit code."""
    result = measure()
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = page(result)
    print(text)
    fill(ROOT / "docs" / "methods.md", text, "eval.methods.vision")
    return 0


def measure() -> dict[str, Any]:
    """Returns what each method keeps of the restored prompt at each budget."""
    model, (ids, pixels) = random_model(), random_prompt()
    rows = []
    with tempfile.TemporaryDirectory() as store:
        restored(model, store, ids, pixels).close()
        with restored(model, store, ids, pixels) as cache:
            assert cache.report.chunks_loaded
            assert not cache.report.chunks_computed
            for keep in KEEPS:
                for name, press in presses(keep).items():
                    report = press(model, cache, ids).report
                    share = report.bytes_after / report.bytes_before
                    rows.append(
                        {"method": name, "keep": keep, "share": share, "entries": report.entries, "error": report.error}
                    )
    images = int((ids == IMAGE).sum())
    return {"tokens": ids.shape[1], "images": images, "rows": rows}


def page(result: Mapping[str, Any]) -> str:
    """Returns the table as Markdown."""
    rows = [
        [
            row["method"],
            f"{100 * row['keep']:.0f} %",
            f"{100 * row['share']:.0f} %",
            ", ".join(f"{entries:.0f}" for entries in row["entries"]),
            f"{row['error']:.3f}",
        ]
        for row in result["rows"]
    ]
    head = f"A tiny model of random weights; {result['tokens']} tokens, {result['images']} of them of two images."
    return "\n".join(
        [head, "", *markdown(["method", "budget", "KV", "entries in each layer, the first one first", "error"], rows)]
    )


def restored(model: Any, store: str, ids: torch.Tensor, pixels: torch.Tensor) -> CakeCache:
    """Returns a cache with the prompt, from the store if it is there."""
    cache = CakeCache(model, store, strategy="load", chunk_size=64)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        max_new_tokens=1,
        do_sample=False,
        **for_generate(model, cache),
    )
    cache.flush()
    return cache


def random_model() -> Any:
    """Returns the model, the same each time."""
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    vision = CLIPVisionConfig(
        image_size=SIDE, patch_size=PATCH, intermediate_size=48, projection_dim=32, **sizes
    ).to_dict()
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    ).to_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlavaForConditionalGeneration(
            LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
        ).eval()
    with torch.no_grad():
        for number, layer in enumerate(model.model.language_model.layers):
            layer.self_attn.q_proj.weight.mul_(SHARPEST ** ((number + 1) / LAYERS))
    return model


def random_prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the token ids `[1, tokens]` and the pixels of both images, the same each time."""
    numbers = torch.Generator().manual_seed(0)
    text = [torch.randint(0, IMAGE, (count,), generator=numbers) for count in TEXT]
    image = torch.full(((SIDE // PATCH) ** 2,), IMAGE)
    ids = torch.cat([text[0], image, text[1], image, text[2]])[None]
    return ids, torch.randn(2, 3, SIDE, SIDE, generator=numbers)


if __name__ == "__main__":
    sys.exit(main())
