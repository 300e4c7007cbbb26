"""The probe: does a chunk that runs alone in a step give KV bit for bit as `generate` gives it?

If so, the engine and `generate` use each other's chunks. If not (padded shapes, compiled steps, other kernels), what of the
engine may change how KV rounds becomes part of its namespace, and its chunks are its own.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.keys import canonical
from cake_hf.model.kv_layout import run_aside, some_tokens
from cake_hf.model.look import one_look
from cake_hf.serving.seams import Engine, RequestState

logger = logging.getLogger("cake_hf")

PROBE = "cake_hf probe"
CHUNKS = 2
"""At least. The second chunk attends to KV that is read back from the engine's memory, the first one does not."""

_verdicts: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


def computes_as_generate(model: Any, engine: Engine, layout: ChunkLayout) -> bool:
    """Returns whether the engine's KV is that of `generate`, bit for bit. Runs a few chunks, once per model and engine.

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
    chunks = _chunks(engine, size)
    ids = some_tokens(model, chunks * size, 7919)
    state = RequestState(request_id=PROBE, initial_tokens=[*ids[0].tolist(), 0])
    windows = []
    try:
        for _ in range(chunks):
            engine.see_windows(on=True)
            engine.run_alone(model, state, size)
            windows.append(engine.seen_windows(size) or ())
        blocks = engine.parts(PROBE, 0, chunks * size, layout.everywhere)
        made = [torch.cat([block[piece] for block in blocks]) for piece in range(layout.everywhere)]
        made += [torch.cat(seen) for seen in zip(*windows, strict=True)]
    finally:
        engine.see_windows(on=False)
        engine.free(PROBE)
    with one_look():
        _, layers = run_aside(model, list(ids.split(size, dim=1)))
    expected = [_kept(layers[piece.layer], piece) for piece in layout.pieces]
    return all(
        torch.equal(mine.reshape(-1).view(torch.uint8)[-its.numel() :], its)
        for mine, its in zip(made, expected, strict=True)
    )


def _chunks(engine: Engine, size: int) -> int:
    """Returns how many chunks are run: until the first one has left a window, if there is room for that."""
    wanted = max(CHUNKS, 1 - (-engine.window // size))
    return wanted if engine.room is None else max(CHUNKS, min(wanted, engine.room // size))


def _kept(layer: Any, piece: Piece) -> torch.Tensor:
    """Returns the bytes that `generate` keeps of a piece; of a window, the last tokens'."""
    kept: torch.Tensor = getattr(layer, piece.name.rpartition(".")[2])
    return kept[0].transpose(0, 1).contiguous().view(torch.uint8).reshape(-1)
