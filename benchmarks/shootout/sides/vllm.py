"""vLLM on a CPU: through its example connector to the disk, or with its own prefix caching in memory.

LMCache is a connector of vLLM, so it has this side, too.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.shootout.questions import BLOCK, DISK, Answer, Options, Question, System

LMCACHE = "LMCache"


class VLLM:
    """One engine; what it keeps in memory is switched off where the disk is to be used."""

    def __init__(self, options: Options) -> None:
        from vllm import LLM  # type: ignore[import-not-found]  # it is in the other environment

        self._options = options
        room = (options.room // BLOCK + 1) * BLOCK
        self._engine: Any = LLM(
            options.model,
            dtype=options.dtype,
            max_model_len=room,
            max_num_batched_tokens=room,
            max_num_seqs=1,
            enforce_eager=True,
            enable_prefix_caching=options.role != DISK,
            **({"kv_transfer_config": self._connector()} if options.role == DISK else {}),
            **({"enable_lora": True, "max_lora_rank": 16} if options.adapter else {}),
        )

    def _connector(self) -> Any:
        from vllm.config import KVTransferConfig  # type: ignore[import-not-found]

        if LMCACHE in self._options.extra:
            return KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
        return KVTransferConfig(
            kv_connector="ExampleConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"shared_storage_path": self._options.store},
        )

    def ask(self, question: Question) -> Answer:
        """Generates; the first token's time is that of a call for one token."""
        if not question.reuse:
            self._engine.reset_prefix_cache()
        begin = time.perf_counter()
        output = self._generate(question)
        return Answer(list(output.outputs[0].token_ids), time.perf_counter() - begin, output.num_cached_tokens)

    def _generate(self, question: Question) -> Any:
        from vllm import SamplingParams

        prompt: dict[str, Any] = {"prompt_token_ids": question.ids}
        if self._options.tenant:
            prompt["cache_salt"] = self._options.tenant
        greedy = SamplingParams(max_tokens=question.new, temperature=0)
        adapter = {}
        if self._options.adapter:
            from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

            adapter = {"lora_request": LoRARequest("adapter", 1, self._options.adapter)}
        return self._engine.generate([prompt], greedy, use_tqdm=False, **adapter)[0]

    def close(self) -> None:
        """Does nothing: its connector has written before it answered."""


def make(options: Options) -> System:
    """Returns the system."""
    return VLLM(options)
