"""The functions that users call, `batching` and `generate_batch`. They import the engine, which older transformers lack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from cake_hf.limits import Limits
from cake_hf.report import Report
from cake_hf.serving.support import require_engine
from cake_hf.stores.opening import StoreSpec

if TYPE_CHECKING:
    from cake_hf.serving.manager import BatchingManager

_OPTIONS = ("chunk_size", "salt", "save", "exact", "strategy", "stall", "limits", "codec", "max_ttft")


@contextmanager
def batching(
    model: torch.nn.Module,
    store: StoreSpec | None = None,
    *,
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    chunk_size: int = 512,
    salt: str = "",
    save: bool = True,
    exact: bool = True,
    strategy: str = "both",
    stall: float = 0.5,
    limits: Limits | None = None,
    codec: str = "none",
    max_ttft: float | None = None,
    workload_hints: Any = None,
    warmup: bool = True,
) -> Iterator[BatchingManager]:
    """Runs transformers' continuous batching with a store: prefixes of requests are restored from it and saved to it.

        with cake_hf.batching(model, store="~/.cache/cake_hf") as manager:
            request = manager.add_request(ids, max_new_tokens=20)

    The manager is a `ContinuousBatchingManager`: `add_request`, `get_result`, streaming and cancelling are as in transformers,
    and `manager.report(request_id)` says what happened to a prompt. Inside the block, `model.generate_batch` uses it, too (and
    stops it at its end, as it does with any manager; `manager.start()` starts it again). At the end of the block, requests
    under way are finished, and chunks to be saved become durable.

    With `exact=True`, the KV of each prompt's full chunks is bit for bit that of `generate(prefill_chunk_size=chunk_size)`,
    whatever was computed, loaded, late or broken. What follows rounds as the engine does in the company of other requests.

    Args:
        model, store, salt, save, strategy, limits: as for `CakeCache`.
        generation_config: the generation config of all requests; the model's own by default.
        continuous_batching_config: a `ContinuousBatchingConfig`. Its `page_size` must be the chunk's size or divide it; by
            default it is the chunk's size.
        chunk_size: tokens per chunk. Caches and engines with the same size share a store's chunks.
        exact: as for `CakeCache`. With False, a front takes what other requests leave of a step, instead of steps of its own.
        codec: as for `CakeCache`, but for the lossy ones.
        max_ttft: refused.
        stall: while requests decode, at most this share of the steps is one restore's alone.
        workload_hints: as in transformers.
        warmup: as in transformers.

    Yields:
        The manager, started.

    Raises:
        CakeError: the installed transformers is older than 5.20.
        UnsupportedModel, StoreError: as for `CakeCache`.
        ValueError: an option is out of range, the codec is unknown or lossy, `max_ttft` is given, or an option does not go with
            the `ContinuousBatchingConfig`.
    """
    require_engine()
    from cake_hf.serving.manager import BatchingManager

    manager = BatchingManager(
        model,
        store,
        generation_config=generation_config,
        continuous_batching_config=continuous_batching_config,
        workload_hints=workload_hints,
        chunk_size=chunk_size,
        salt=salt,
        save=save,
        exact=exact,
        strategy=strategy,
        stall=stall,
        limits=limits,
        codec=codec,
        max_ttft=max_ttft,
    )
    try:
        if warmup:
            manager.warmup()
        manager.start()
        yield manager
    finally:
        manager.close()


def generate_batch(
    model: Any,
    inputs: Sequence[Sequence[int]],
    *,
    store: StoreSpec | None = None,
    report: Callable[[Mapping[str, Report]], object] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Runs `model.generate_batch(inputs, **kwargs)` with the prompts' KV restored from, and saved to, a store.

    Args:
        model, store: as for `batching`.
        inputs: token ids of each prompt.
        report: called at the end with the report of each request, by its id.
        **kwargs: options of `batching`; all others are those of `model.generate_batch`.

    Returns:
        What `model.generate_batch` returns.

    Raises:
        Exception: what `batching` and `model.generate_batch` raise.
    """
    require_engine()
    from cake_hf.serving.manager import BatchingManager
    from cake_hf.serving.seams import hints_for

    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    configs: dict[str, Any] = {name: kwargs.get(name) for name in ("generation_config", "continuous_batching_config")}
    hints = hints_for(model, inputs, configs["generation_config"], kwargs.get("max_new_tokens"))
    manager = BatchingManager(model, store, workload_hints=hints, **configs, **options)
    try:
        answers: dict[str, Any] = manager.model.generate_batch(list(inputs), **kwargs)
        if report is not None:
            manager.flush(manager.limits.exit_flush_seconds)
            report({name: found for name in answers if (found := manager.report(name)) is not None})
    finally:
        manager.close()
    return answers
