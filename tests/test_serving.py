"""What the page about serving says, beyond its snippets, `test_sharing.py` and `test_one_user.py`."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.generation import configuration_utils

from cake_hf import CakeCache, MemoryStore
from models import CHUNK, build, prompt


@pytest.mark.skipif(
    not hasattr(configuration_utils, "ContinuousBatchingConfig"),
    reason="this version of transformers has continuous batching in another form, or not at all",
)
def test_continuous_batching_runs_as_usual_and_stores_nothing() -> None:
    model: Any = build("llama")
    prompts = [prompt(seed=seed)[0].tolist() for seed in (1, 2)]
    options = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
    small = configuration_utils.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64, max_memory_percent=0.01)

    def answers() -> list[list[int]]:
        found = model.generate_batch(inputs=prompts, generation_config=options, continuous_batching_config=small)
        return [found[name].generated_tokens for name in sorted(found)]

    alone, store = answers(), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        assert answers() == alone
        assert cache.flush(60)
        assert cache.report.reason_code == "no-prompt-yet"
    assert len(alone) == 2
    assert list(store.keys()) == []
