"""Prompts through a store that goes wrong, on one small model, and what they have to give."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import cake_hf
from cake_hf import CakeCache, Limits, StoreError
from faulty import Faulty, Panic
from models import CHUNK, NEW_TOKENS, difference, expected, prompt, run, shared_model
from waiting import PATIENCE, join_loaders

QUICK = Limits(read_timeout=0.2, lookup_timeout=0.2, exit_flush_seconds=0.2)
"""For what hangs. Answers do not depend on whether something else is late, too."""

PATIENT = Limits(read_timeout=PATIENCE, lookup_timeout=PATIENCE, exit_flush_seconds=PATIENCE)

MOST_THREADS = 12
"""Loaders that may hang, a writer, and a question of each kind."""

RAISED: dict[str, Callable[[], BaseException]] = {
    "OSError": lambda: OSError(errno.EIO, "no such luck"),
    "StoreError": lambda: StoreError("The store is down."),
    "odd": lambda: KeyError("an author's mistake"),
    "panic": lambda: Panic("index out of bounds"),
    "interrupt": KeyboardInterrupt,
    "exit": lambda: SystemExit(3),
    "cancelled": asyncio.CancelledError,
    "stop": StopIteration,
}


def opened(store: Any, **options: Any) -> CakeCache:
    return CakeCache(shared_model("llama"), store, chunk_size=CHUNK, **options)


def is_right(cache: CakeCache) -> bool:
    return difference(run(shared_model("llama"), prompt(), cache), expected()) == ""


def plain_tokens() -> list[int]:
    return expected().tokens[0].tolist()


def prompts_go_well(store: Faulty, limits: Limits) -> None:
    """Two caches after each other, on a model that has not been seen with that store."""
    for strategy in ("both", "load"):
        with opened(store, strategy=strategy, limits=limits) as cache:
            assert is_right(cache)
            cache.flush(limits.exit_flush_seconds)
        join_loaders()


def generated(path: Any, **options: Any) -> list[int]:
    return cake_hf.generate(  # type: ignore[no-any-return]
        shared_model("llama"),
        prompt(),
        store=path,
        chunk_size=CHUNK,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )[0].tolist()
