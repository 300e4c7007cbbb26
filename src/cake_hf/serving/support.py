"""Checks what continuous batching needs: the version and the memory of an engine, and why its requests are not restored."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers.utils import is_psutil_available

from cake_hf import limits
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossy import is_lossy
from cake_hf.errors import CakeError
from cake_hf.layers.compat import installed_version, is_older_than
from cake_hf.model.fingerprint import adapters_vary
from cake_hf.model.foreign_code import foreign_code_refusal
from cake_hf.report import Refusal
from cake_hf.restore.audit import audit_refusal
from cake_hf.restore.bound_store import check_codec
from cake_hf.restore.session import Session
from cake_hf.restore.support import (
    MIXED_ADAPTERS,
    TRAINING,
    ahead_refusal,
    kept_refusal,
    misunderstood_refusal,
)

OLDEST = "5.20"
"""The oldest transformers whose continuous batching has the memory that we know."""


def require_engine() -> None:
    """Raises an error if the installed transformers has no engine that we know.

    Raises:
        CakeError: it is too old.
    """
    if is_older_than(OLDEST):
        raise CakeError(
            f"Restoring in continuous batching needs transformers {OLDEST} or newer, and {installed_version()} is installed; "
            "CakeCache and cake_hf.generate work with it."
        )


def default_share(device_type: str) -> float | None:
    """Returns the share of all memory for an engine whose configuration sets none; None for transformers' own default."""
    if device_type != "cpu" or not is_psutil_available():
        return None
    memory = import_module("psutil").virtual_memory()
    return float(min(limits.ENGINE_BYTES, limits.ENGINE_SHARE * memory.available) / memory.total)


def refuse_lossy(codec: str, max_ttft: float | None = None) -> None:
    """Raises an error for what would give an engine's chunks KV that is not exact, and for a codec that there is not.

    Raises:
        ValueError: the codec is lossy or unknown, or there is a time to keep.
    """
    check_codec(codec, exact=False)
    if max_ttft is not None:
        raise ValueError("Continuous batching loads all chunks whole; take CakeCache or cake_hf.generate for max_ttft.")
    if is_lossy(codec):
        raise ValueError(
            f"codec {codec!r} is lossy, and continuous batching computes each chunk from exact KV; take codec='lossless', or "
            "CakeCache or cake_hf.generate for a lossy one."
        )


def attention_refusal(model: Any) -> Refusal | None:
    """Returns why a model's attention, as an engine has set it, keeps prompts from being restored; None if it does not.

    An engine runs eager attention in a form that makes no mask in any other forward. So nothing can be found out about the
    model, and what it would compute meanwhile is wrong.
    """
    if str(model.config._attn_implementation).startswith("paged|"):
        return Refusal(
            "engine-attention",
            "in continuous batching, prompts of a model with eager attention cannot be restored; load it with "
            "attn_implementation='sdpa', or a flash attention",
        )
    return None


def engine_refusal(engine: Any, layout: ChunkLayout) -> Refusal | None:
    """Returns why an engine's requests cannot be restored; None if they can."""
    if engine.ranks > 1:
        return Refusal(
            "engine-ranks", "in continuous batching, prompts of a tensor-parallel model cannot be restored yet"
        )
    blocks, full = layout.chunk_size // engine.page, layout.everywhere
    sizes = sum(layout.sizes[:full]), sum(layout.sizes[full:])
    if (
        len(set(layout.sizes)) != 1
        or sizes != tuple(blocks * nbytes for nbytes in engine.block_bytes)
        or [piece.layer for piece in layout.pieces[full::2]] != engine.windowed_layers
    ):
        return Refusal("engine-layout", "continuous batching keeps this model's KV in another layout than generate")
    if engine.step_tokens < layout.chunk_size:
        return Refusal(
            "engine-steps",
            f"the engine's steps have at most {engine.step_tokens} tokens, less than a chunk of {layout.chunk_size}",
        )
    return None


def prompts_refusal(session: Session, layers: list[Any], namespace: str, tokens: int) -> Refusal | None:
    """Returns why the model's prompts must be computed plainly for now; None if they are restored."""
    model = session.model
    return (
        misunderstood_refusal(model)
        or (TRAINING if model.training else None)
        or (MIXED_ADAPTERS if adapters_vary(model) else None)
        or foreign_code_refusal(model)
        or kept_refusal(model, layers, tokens)
        or (None if session.bound_model.vouched_for == namespace else ahead_refusal(model))
        or audit_refusal(model, namespace)
    )
