"""The probe: does a chunk that runs alone in a step give KV bit for bit as `generate` gives it?

If so, the engine and `generate` use each other's chunks. If not (padded shapes, compiled steps, other kernels), what of the
engine may change how KV rounds becomes part of its namespace, and its chunks are its own.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from cake_hf.chunks.layout import ChunkLayout
from cake_hf.keys import canonical
from cake_hf.model.kv_layout import run_aside, some_tokens
from cake_hf.model.look import one_look
from cake_hf.serving.seams import Engine, RequestState

logger = logging.getLogger("cake_hf")

PROBE = "cake_hf probe"
CHUNKS = 2
"""The second chunk attends to KV that is read back from the engine's memory, the first one does not."""

_verdicts: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


def computes_as_generate(model: Any, engine: Engine, layout: ChunkLayout) -> bool:
    """Returns whether the engine's KV is that of `generate`, bit for bit. Runs four chunks, once per model and engine.

    Args:
        model: of the engine.
        engine: before its first step.
        layout: of a chunk.
    """
    about = canonical(
        {**engine.metadata(), "attention": str(model.config._attn_implementation), "layout": layout.tensor_table}
    )
    known = _verdicts.setdefault(model, {})
    if about not in known:
        try:
            known[about] = _are_equal(model, engine, layout)
        except Exception as error:
            logger.debug("Whether the engine computes as generate does is not known: %s", error)
            return False
    return known[about]


def _are_equal(model: Any, engine: Engine, layout: ChunkLayout) -> bool:
    size = layout.chunk_size
    ids = some_tokens(model, CHUNKS * size, 7919)
    state = RequestState(request_id=PROBE, initial_tokens=[*ids[0].tolist(), 0])
    try:
        for _ in range(CHUNKS):
            engine.run_alone(model, state, size)
        made = engine.parts(PROBE, 0, CHUNKS * size, len(layout.pieces))
        found = [torch.cat([block[piece] for block in made]) for piece in range(len(layout.pieces))]
    finally:
        engine.free(PROBE)
    with one_look():
        _, layers = run_aside(model, list(ids.split(size, dim=1)))
    expected = [kept[0].transpose(0, 1).contiguous() for layer in layers for kept in (layer.keys, layer.values)]
    return all(torch.equal(mine, its.view(torch.uint8).reshape(-1)) for mine, its in zip(found, expected, strict=True))
