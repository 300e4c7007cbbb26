"""What newer versions have: codecs, and serving many requests at once. Where it is missing, that is said."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import cake_hf
from benchmarks.cells import ttft
from benchmarks.figures import Figure
from benchmarks.gpu_check.desk import Desk, NotHere
from benchmarks.grid.axes import BITS_PER_BYTE, GIGA
from benchmarks.timing import Sample, interleave
from benchmarks.workbench import Run, Workbench, synchronize
from cake_hf import CakeCache
from cake_hf.errors import CakeError
from cake_hf.serving.support import require_engine
from cake_hf.stores.local import LocalStore
from cake_hf.testing import ThrottledStore

GBPS = 32
CODECS = ("none", "lossless")
REQUESTS = 22
SHORTEST, LONGEST = 32, 448
"""Tokens of the short requests, as in the paper."""


def run_codecs(desk: Desk) -> None:
    """Load-only with each codec from a throttled disk: fewer bytes, and decoding on the way.

    Raises:
        NotHere: caches have no codecs.
    """
    if "codec" not in inspect.signature(CakeCache).parameters:
        raise NotHere("caches have no codec")
    bench = desk.saving_bench()
    arms: dict[str, Callable[[], Run]] = {}
    stored: dict[str, int] = {}
    for codec in CODECS:
        store = LocalStore(bench.fresh_folder(), budget=None)
        with _coded(bench, store, codec, save=True) as cache:
            bench.generate(cache, f"saving, codec {codec}")
            cache.flush()
        stored[codec] = sum(entry.nbytes for entry in store.entries())
        slow = ThrottledStore(store, GBPS * GIGA / BITS_PER_BYTE)
        arms[codec] = partial(_loaded, bench, slow, codec)
    runs = {name: ttft(found) for name, found in interleave(arms, bench.settings.repeats).items()}
    plain, coded = (runs[codec] for codec in CODECS)
    figures = {
        "lossless_seconds": Figure.of(f"load-only, lossless, {GBPS} Gbps", coded),
        "lossless_ratio": Figure.ratio("lossless over plain", coded, plain),
        "size": Figure.of("bytes, lossless over plain", Sample((stored["lossless"] / stored["none"],)), "x"),
    }
    desk.keep({"figures": {name: one.as_dict() for name, one in figures.items()}, "parity": bench.parity.as_dict()})


def _coded(bench: Workbench, store: Any, codec: str, **options: Any) -> Any:
    cache: Any = CakeCache
    settings = bench.settings
    return cache(bench.model, store, chunk_size=settings.chunk_size, limits=settings.limits, codec=codec, **options)


def _loaded(bench: Workbench, store: Any, codec: str) -> Run:
    with _coded(bench, store, codec, save=False, strategy="load") as cache:
        run = bench.generate(cache, f"load, codec {codec}")
    if run.report.chunks_loaded != bench.settings.chunks:
        raise CakeError(f"{run.report.chunks_loaded} of {bench.settings.chunks} chunks were loaded with {codec}.")
    return run


def run_serving(desk: Desk) -> None:
    """One long prompt that is stored and many short ones, at once: with a store, and by transformers alone.

    Raises:
        NotHere: there is no `cake_hf.generate_batch`, or this transformers has no engine for it.
    """
    serve = getattr(cake_hf, "generate_batch", None)
    if serve is None:
        raise NotHere("there is no cake_hf.generate_batch")
    try:
        require_engine()
    except CakeError as error:
        raise NotHere(str(error)) from None
    sizes = desk.sizes
    bench = desk.saving_bench()
    model, settings = bench.model, bench.settings
    inputs = [bench.ids[0].tolist(), *_short_requests(settings.shape.vocabulary)]
    store = LocalStore(desk.folder / "served", budget=None)

    def timed(call: Callable[..., Any], **options: Any) -> float:
        synchronize(sizes.device)
        begin = time.perf_counter()
        call(inputs=inputs, max_new_tokens=sizes.new_tokens, **options)
        synchronize(sizes.device)
        return time.perf_counter() - begin

    ours = partial(timed, partial(serve, model), store=store, chunk_size=settings.chunk_size, limits=settings.limits)
    ours()  # the prefix is stored by this
    runs = interleave({"ours": ours, "plain": partial(timed, model.generate_batch)}, sizes.repeats)
    mine, plain = (Sample(tuple(runs[name])) for name in ("ours", "plain"))
    figures = {
        "seconds": Figure.of("all requests, prefix stored", mine),
        "ratio": Figure.ratio("over transformers alone", mine, plain),
    }
    desk.keep({"figures": {name: one.as_dict() for name, one in figures.items()}})


def _short_requests(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(22)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (REQUESTS,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
