"""On versions of transformers whose `prefill_chunk_size` gives other results than forwards of the chunks: the latter instead.

It is the reference of nearly every test, and of the bench and the evaluation. test_transformers_contract.py shows that what is
mended here is wrong, and that the rest is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin

from cake_hf.layers.compat import named_for

OLD = Version(transformers.__version__) < Version("5.17")

WRONG_BEFORE = Version("5.3")
"""Among those before it some are right; they lose nothing."""


def mend_chunked_prefill() -> None:
    """Have `generate(prefill_chunk_size=...)` run the chunks by plain forwards, where this version is one of those."""
    if Version(transformers.__version__) >= WRONG_BEFORE or hasattr(GenerationMixin._prefill, "original"):
        return
    original = GenerationMixin._prefill

    def prefill(
        self: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *more: Any
    ) -> Any:
        size, generation_config.prefill_chunk_size = generation_config.prefill_chunk_size, None
        cache = model_kwargs.get(next(iter(named_for(self, None))))
        if size is not None and cache is not None:
            _run_ahead(self, input_ids, size, model_kwargs.get("attention_mask"), cache)
        return original(self, input_ids, generation_config, model_kwargs, *more)

    prefill.original = original  # type: ignore[attr-defined]
    GenerationMixin._prefill = prefill


@contextmanager
def skipped_where_older_versions_fail() -> Iterator[None]:
    """For what transformers does by itself, on a `DynamicCache`: where an old one fails at it, there is nothing to compare."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        if not OLD:
            raise
        pytest.skip(f"transformers {transformers.__version__} fails at it by itself: {error}")


def _run_ahead(model: Any, ids: torch.Tensor, size: int, mask: torch.Tensor | None, cache: Any) -> None:
    for start in range(cache.get_seq_length(), ids.shape[1] - size, size):
        end = start + size
        masked = {} if mask is None else {"attention_mask": mask[:, :end]}
        model(ids[:, start:end], **masked, **named_for(model, cache), use_cache=True, logits_to_keep=1)
