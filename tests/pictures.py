"""A small model that looks at pictures, with the processor that belongs to it, for snippets about images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from snippets import MODEL

SIDE, PATCH = 48, 4
"""Pixels. A picture is 144 tokens, more than a chunk on a CPU."""
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}assistant: "
)


def set_up_pictures(home: Path, patch: pytest.MonkeyPatch) -> None:
    """Put two pictures into a folder; models and processors for images are ours from now on."""
    from PIL import Image

    for name, colour in (("page.png", (240, 230, 200)), ("other-page.png", (30, 60, 90))):
        Image.new("RGB", (SIDE, SIDE), colour).save(home / name)
    tokenizer = hf.AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    patch.setattr(hf.AutoModelForImageTextToText, "from_pretrained", lambda name, dtype: _model(tokenizer, dtype))
    patch.setattr(hf.AutoProcessor, "from_pretrained", lambda name: _processor(tokenizer))


def _processor(tokenizer: Any) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return hf.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**sizes),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def _model(tokenizer: Any, dtype: torch.dtype) -> Any:
    text = {**hf.AutoConfig.from_pretrained(MODEL).to_dict(), "vocab_size": len(tokenizer)}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "projection_dim": 16,
    }
    place = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=place)
    return hf.LlavaForConditionalGeneration(config).to(dtype).eval()
