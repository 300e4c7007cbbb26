"""Why an engine's requests are not restored: of the engine, and of the model in it."""

from __future__ import annotations

from typing import Any

from cake_hf.chunks.layout import ChunkLayout
from cake_hf.errors import CakeError
from cake_hf.layers.compat import installed_version, is_older_than
from cake_hf.model.fingerprint import adapters_vary
from cake_hf.model.foreign_code import stranger_reason
from cake_hf.restore.audit import refused_reason
from cake_hf.restore.session import Session
from cake_hf.restore.support import ahead_reason, kept_reason, misunderstood_reason

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


def attention_reason(model: Any) -> str:
    """Returns why a model's attention, as an engine has set it, keeps prompts from being restored; empty if it does not.

    An engine runs eager attention in a form that makes no mask in any other forward. So nothing can be found out about the
    model, and what it would compute meanwhile is wrong.
    """
    if str(model.config._attn_implementation).startswith("paged|"):
        return (
            "in continuous batching, prompts of a model with eager attention cannot be restored; load it with "
            "attn_implementation='sdpa', or a flash attention"
        )
    return ""


def engine_reason(engine: Any, layout: ChunkLayout) -> str:
    """Returns why an engine's requests cannot be restored; empty if they can.

    Args:
        engine: an `Engine`.
        layout: of a chunk, as `generate` makes it.
    """
    if engine.ranks > 1:
        return "in continuous batching, prompts of a tensor-parallel model cannot be restored yet"
    if engine.has_windows:
        return "in continuous batching, prompts of a model with sliding windows cannot be restored yet"
    blocks = layout.chunk_size // engine.page
    if len(set(layout.sizes)) != 1 or layout.nbytes != blocks * engine.block_bytes:
        return "continuous batching keeps this model's KV in another layout than generate"
    if engine.step_tokens < layout.chunk_size:
        return f"the engine's steps have at most {engine.step_tokens} tokens, less than a chunk of {layout.chunk_size}"
    return ""


def prompts_reason(session: Session, layers: list[Any], namespace: str, tokens: int) -> str:
    """Returns why the model's prompts are to be computed plainly just now; empty if they are restored.

    Args:
        session: with the model.
        layers: that a `CakeCache` for the model has.
        namespace: of the session.
        tokens: of the longest prompt in question.
    """
    model = session.model
    return (
        misunderstood_reason(model)
        or "the model is in training mode" * model.training
        or "adapters are chosen by the row, or by the place in the prompt" * adapters_vary(model)
        or stranger_reason(model)
        or kept_reason(model, layers, tokens)
        or ("" if session.bound_model.vouched_for == namespace else ahead_reason(model))
        or refused_reason(model, namespace)
    )
