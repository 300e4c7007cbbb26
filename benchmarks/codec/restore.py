"""`python -m benchmarks.codec.restore --model NAME`: the first token with encoded chunks, over that with raw ones.

The store is memory behind a line of a fixed bandwidth: loading all raw KV takes so many times as long as computing all. A
restore with raw and one with encoded chunks follow one another in each round, and their ratio is what counts.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from benchmarks.machine import Machine
from benchmarks.models import build_model, build_prompt
from benchmarks.settings import SHAPES, Settings
from cake_hf import CakeCache, LocalStore, MemoryStore
from cake_hf.cli.models import load_model, load_tokenizer, quiet_transformers
from cake_hf.stores.base import Store
from cake_hf.testing import ThrottledStore
from cake_hf.testing.haystack import real_text

CODECS = ("none", "lossless")
SHARES = (0.5, 1.0, 2.0)
LESSONS = 3


def seconds(model: Any, ids: torch.Tensor, store: Store, strategy: str, codec: str, chunk_size: int) -> float:
    """Returns the seconds of one prefill that saves nothing."""
    with CakeCache(model, store, chunk_size=chunk_size, strategy=strategy, codec=codec, save=False) as cache:
        begin = time.perf_counter()
        report = cache.prefill(ids, whole=True)
        took = time.perf_counter() - begin
    assert not report.chunks_failed
    assert strategy != "load" or not report.chunks_computed
    return took


def filled(model: Any, ids: torch.Tensor, store: Store, codec: str, chunk_size: int) -> int:
    """Saves the prompt; returns the bytes that it takes."""
    with CakeCache(model, store, chunk_size=chunk_size, codec=codec) as cache:
        cache.prefill(ids, whole=True)
        cache.flush()
        assert not cache.report.chunks_unsaved
        return cache.report.bytes_stored


def filled_as_learned(model: Any, ids: torch.Tensor, store: LocalStore, chunk_size: int) -> int:
    """Saves the prompt with the codec "auto", once what loads of it took has been learned; returns the bytes that it takes."""
    filled(model, ids, store, "auto", chunk_size)
    for _ in range(LESSONS):
        seconds(model, ids, store, "load", "auto", chunk_size)
    for key in list(store.keys()):
        store.delete(key)
    return filled(model, ids, store, "auto", chunk_size)


def compared(run: Any, rounds: int, codec: str = "lossless") -> dict[str, Any]:
    """Runs a codec and none in turn, once to learn and then `rounds` times; returns medians, and the ratio's range."""
    took: dict[str, list[float]] = {"none": [], codec: []}
    for number in range(rounds + 1):
        for one in took:
            second = run(one)
            took[one] += [second] if number else []
    ratios = sorted(one / other for one, other in zip(took[codec], took["none"], strict=True))
    return {
        "seconds": {codec: median(all_of) for codec, all_of in took.items()},
        "ratio": median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
    }


def model_and_prompt(name: str, tokens: int) -> tuple[Any, torch.Tensor]:
    """Returns a model in bfloat16, and a prompt of real text `[1, tokens]`; of a shape, random weights and tokens."""
    if name in SHAPES:
        settings = Settings(shape=SHAPES[name], tokens=tokens, suffix_tokens=0, device="cpu")
        return build_model(settings), build_prompt(settings)
    with quiet_transformers():
        model, tokenizer = load_model(name, "bfloat16", "cpu"), load_tokenizer(name)
    return model, tokenizer(real_text(8 * tokens), return_tensors="pt").input_ids[:, :tokens]


def main(
    model: Annotated[str, typer.Option(help=f"Folder or name of a model, or one of {', '.join(SHAPES)}.")],
    tokens: int = 1024,
    chunk_size: int = 128,
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """Measures load-only and both at three bandwidths, and a page-cached directory."""
    machine = Machine()
    loaded, ids = model_and_prompt(model, tokens)
    stores = {codec: MemoryStore() for codec in CODECS}
    nbytes = {codec: filled(loaded, ids, store, codec, chunk_size) for codec, store in stores.items()}
    computing = median(seconds(loaded, ids, MemoryStore(), "compute", "none", chunk_size) for _ in range(3))
    cells: dict[str, Any] = {}
    print("computing", computing, "size", nbytes["lossless"] / nbytes["none"], flush=True)
    with TemporaryDirectory() as folder:
        disks = {codec: LocalStore(Path(folder) / codec, budget=None) for codec in (*CODECS, "auto")}
        for codec in CODECS:
            filled(loaded, ids, disks[codec], codec, chunk_size)
        nbytes["auto"] = filled_as_learned(loaded, ids, disks["auto"], chunk_size)
        for name, places, codec in (
            ("memory, load", stores, "lossless"),
            ("page cache, load", disks, "lossless"),
            ("page cache, load, auto", disks, "auto"),
        ):
            cells[name] = compared(
                lambda codec, places=places: seconds(loaded, ids, places[codec], "load", codec, chunk_size),
                3 * rounds,
                codec,
            )
            print(name, json.dumps(cells[name]), flush=True)
    for strategy in ("both", "load"):
        for share in SHARES:
            rate = nbytes["none"] / computing / share
            lines = {codec: ThrottledStore(store, rate) for codec, store in stores.items()}
            name = f"{strategy} at {share:g}"
            cells[name] = compared(
                lambda codec, lines=lines, strategy=strategy: seconds(
                    loaded, ids, lines[codec], strategy, codec, chunk_size
                ),
                rounds,
            )
            print(name, json.dumps(cells[name]), flush=True)
    outcome = {
        "machine": machine.as_dict(),
        "model": Path(model).name,
        "tokens": tokens,
        "chunk_size": chunk_size,
        "rounds": rounds,
        "computing": computing,
        "size": nbytes["lossless"] / nbytes["none"],
        "size_auto": nbytes["auto"] / nbytes["none"],
        "cells": cells,
    }
    print(json.dumps(outcome))
    if out is not None:
        out.write_text(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    typer.run(main)
