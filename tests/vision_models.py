"""Vision-language models, tiny and random, and prompts for them as their processors would make them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

from families import COMMON, WINDOW, remember_more
from models import CHUNK, VOCABULARY

PLACE = VOCABULARY - 8
"""The token that stands for a part of an image."""

Parts = tuple["int | str", ...]
"""A prompt: so many tokens of text, or an image by its name."""

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_PLACES: dict[str, Any] = {"image_token_id": PLACE, "video_token_id": PLACE + 1, "vision_start_token_id": PLACE + 2}
_PATCHES = {"depth": 2, "num_heads": 2, "patch_size": 2, "temporal_patch_size": 2, "spatial_merge_size": 2}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

GRIDS = {"A": (1, 4, 4), "B": (1, 2, 8), "C": (1, 6, 4)}
"""For models that take images of any size; others see all images at the same one."""
PATCH = 3 * 2 * 2 * 2
IMAGE_SIZE = 8


def _qwen2_5_vl() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 8, **_PATCHES}
    config = hf.Qwen2_5_VLConfig(
        text_config={**COMMON, **_MROPE}, vision_config={**vision, "fullatt_block_indexes": [1]}, **_PLACES
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    vision = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, **_PATCHES}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config={**COMMON, **_MROPE}, vision_config=vision, **_PLACES)
    )


def _qwen3_vl() -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        **_PATCHES,
    }
    config = hf.Qwen3VLConfig(
        text_config={**COMMON, **_MROPE, "head_dim": 8},
        vision_config={**vision, "deepstack_visual_indexes": [0, 1]},
        **_PLACES,
    )
    return hf.Qwen3VLForConditionalGeneration(config)


def _gemma3() -> Any:
    text = {
        **COMMON,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }
    vision = {**_TOWER, "image_size": IMAGE_SIZE, "patch_size": 2, "vision_use_head": False}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=PLACE)
    )


def _llava() -> Any:
    vision = {
        **_TOWER,
        "model_type": "clip_vision_model",
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "projection_dim": 16,
    }
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config={**COMMON, "model_type": "llama"}, vision_config=vision, image_token_index=PLACE)
    )


def _internvl() -> Any:
    vision = {**_TOWER, "image_size": [IMAGE_SIZE, IMAGE_SIZE], "patch_size": [2, 2]}
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(text_config={**COMMON, "model_type": "qwen2"}, vision_config=vision, image_token_id=PLACE)
    )


VISION: dict[str, Callable[[], Any]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "llava": _llava,
    "internvl": _internvl,
}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MAIN = ("qwen2_5_vl", "gemma3")
"""One of each way to take images."""


@cache
def vision_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The family's model, the same in every process. Leave it as it is."""
    torch.manual_seed(0)
    model = VISION[family]().to(dtype).eval()
    remember_more(model)
    return model


def standard_parts(family: str) -> Parts:
    """Six chunks and seven tokens, with two images; the first lies across a chunk's end, where it can be cut."""
    start = 18 if family == "gemma3" else CHUNK - 2
    rest = 6 * CHUNK + 7 - start - 30 - sum(tokens_of(family, name) for name in "AB")
    return (start, "A", 30, "B", rest)


def tokens_of(family: str, image: str) -> int:
    """How many tokens an image is."""
    _, height, width = GRIDS[image[0]]
    return height * width // 4 if family in QWEN else 4


def pixels_of(family: str, image: str) -> torch.Tensor:
    """An image's pixels; its name's first letter says its form, all of it its content."""
    generator = torch.Generator().manual_seed(sum(letter * 97**place for place, letter in enumerate(image.encode())))
    if family in QWEN:
        _, height, width = GRIDS[image[0]]
        return torch.randn((height * width, PATCH), generator=generator)
    return torch.randn((1, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator)


def inputs_for(family: str, parts: Parts, seed: int = 1) -> dict[str, torch.Tensor]:
    """What the family's processor would make of a prompt; the text depends on the place in the prompt, and on the seed."""
    words = torch.randint(3, PLACE, (1024,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    for part in parts:
        ids += words[len(ids) : len(ids) + part] if isinstance(part, int) else [PLACE] * tokens_of(family, part)
    images = [part for part in parts if isinstance(part, str)]
    inputs = {"input_ids": torch.tensor([ids])}
    if images:
        inputs["pixel_values"] = torch.cat([pixels_of(family, image) for image in images])
        if family in QWEN:
            inputs["image_grid_thw"] = torch.tensor([GRIDS[image[0]] for image in images])
    types = (inputs["input_ids"] == PLACE).long()
    if family in QWEN:
        inputs["mm_token_type_ids"] = types
    elif family == "gemma3":
        inputs["token_type_ids"] = types
    return inputs
