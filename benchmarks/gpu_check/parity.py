"""Is restoring exact on this device? Tiny models of several families, in each dtype and with each attention kernel.

For each: cold, warm, every meeting point of 8 chunks, and stores with faults, bit for bit against a chunked `DynamicCache`
(see `grid.exactness`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from benchmarks.gpu_check.desk import Desk
from benchmarks.gpu_check.families import VOCABULARY, runs_here, tiny_model
from benchmarks.gpu_check.outcome import Plain
from benchmarks.grid.exactness import CHUNKS, Examination
from benchmarks.settings import Settings
from benchmarks.workbench import Workbench, remove
from cake_hf.util.redaction import shown

TAIL = 7
"""Tokens behind the last chunk."""
SPARE = 1.5
"""A model is examined if there is so many times as long as the slowest one took."""

Variant = tuple[str, str, str]


def run(desk: Desk) -> None:
    """Examine one model after the other, as long as there is time."""
    found: Plain = {"models": {}, "runs": 0, "wrong": [], "left_out": []}
    longest = 0.0
    for variant in variants(desk):
        name = ", ".join(variant)
        if desk.left < SPARE * longest:
            found["left_out"].append(name)
            desk.keep(found)
            continue
        left = desk.left
        result = examined(desk, variant)
        seconds = left - desk.left
        longest = max(longest, seconds)
        found["models"][name] = {**result, "seconds": round(seconds, 2)}
        found["runs"] += result["runs"]
        found["wrong"] += [f"{name}: {wrong}" for wrong in result["wrong"]]
        desk.keep(found)


def variants(desk: Desk) -> Iterator[Variant]:
    """(family, dtype, attention): all families with the usual kernel first."""
    sizes = desk.sizes
    for attention, dtype, family in product(sizes.attentions, sizes.dtypes, sizes.families):
        if runs_here(attention, dtype, sizes.device):
            yield family, dtype, attention


def examined(desk: Desk, variant: Variant) -> Plain:
    """What one model came to. One that cannot be run at all counts as wrong: nothing was shown."""
    family, dtype, attention = variant
    sizes, folder = desk.sizes, desk.folder / "-".join(variant)
    chunk = sizes.tiny_chunk
    settings = Settings(
        tokens=CHUNKS * chunk, suffix_tokens=TAIL, chunk_size=chunk, dtype=dtype, device=sizes.device, repeats=1
    )
    tried: list[str] = []
    try:
        model = tiny_model(family, dtype, attention, sizes.device, window=chunk * 5 // 2)
        ids = torch.randint(0, VOCABULARY, (1, settings.tokens + TAIL), generator=torch.Generator().manual_seed(1))
        folder.mkdir()
        examination = Examination(Workbench(settings, model, ids.to(sizes.device), folder))
        tried = examination.found.tried
        for _ in examination.steps():
            pass
        wrong = examination.found.wrong
    except Exception as error:
        wrong = [f"it could not be examined: {type(error).__name__}: {shown(error)}"]
    remove(folder)
    return {"runs": len(tried), "wrong": wrong}
