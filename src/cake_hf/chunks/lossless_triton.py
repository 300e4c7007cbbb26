"""The lossless codec's decoder as Triton kernels, with which a chunk crosses to a GPU encoded: 0.70 of its bytes, or 0.51.

**Not run on a GPU yet**, only by Triton's interpreter on a CPU (`make test-triton`), so `transfer/device_decoding.py` tries it
before it uses it. Triton is no dependency: only that file imports this one, when it is needed. docs/format.md describes the
bytes.

A number's escape lies behind those of all numbers before it. So a first kernel counts the escapes of each tile, and a second
one decodes. Whatever the bytes are, nothing is read or written outside the payload and the places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossless import EncodedSizes
from cake_hf.errors import CorruptChunk

TILE = 4096
"""Numbers that one program decodes; whole blocks of the format, which have 256."""

MOST_BYTES = 2**31
"""Of a piece: offsets in it have 32 bits."""

_FIELDS = 7
"""Of a piece in the table: offsets of its windows, refinement and escapes; counts of escapes, channels and numbers; the address
of its place."""


def decode_on_device(
    payload: torch.Tensor,
    sizes: EncodedSizes,
    layout: ChunkLayout,
    places: Sequence[torch.Tensor],
    *,
    near: bool = False,
) -> torch.Tensor:
    """Decodes a chunk whose encoded payload is on the device, behind all work on the current stream.

    Args:
        payload: `[sizes.nbytes]` uint8.
        sizes: see `EncodedSizes.check`.
        layout: of the chunk, of bfloat16 KV.
        places: where the pieces go: contiguous, uint8, on the same device, on an even address.
        near: whether the bases alone are decoded, as `decode_base_into` does; there may then be no refinements.

    Returns:
        `[pieces]` bool on the device: which pieces are not as the encoder makes them. Their places are undefined.

    Raises:
        CorruptChunk: the sizes are not such as the encoder gives.
    """
    lengths = [place.nbytes for place in places]
    if payload.nbytes != sizes.nbytes or lengths != list(layout.sizes) or max(lengths, default=0) >= MOST_BYTES:
        raise ValueError("These are not the sizes and places of that layout's pieces.")
    rows, tiles, at, end = [], 1, 0, sizes.base_bytes
    wrong = torch.zeros(len(places), dtype=torch.bool, device=payload.device)
    for number, (place, channels) in enumerate(zip(places, layout.channels, strict=True)):
        base, refinement, numbers = sizes.bases[number], sizes.refinements[number], place.nbytes // 2
        if sizes.is_raw(number, place.nbytes):
            place.copy_(payload[at : at + base])
            rows.append([0] * _FIELDS)
        else:
            escapes = base - channels - numbers
            if not channels or escapes < 0 or not (near or refinement == -(-numbers // 256) * 96):
                raise CorruptChunk(f"Encoded piece {number} has a wrong size.")
            rows.append([at, end, at + channels + numbers, escapes, channels, numbers, place.data_ptr()])
            tiles = max(tiles, -(-numbers // TILE))
        at, end = at + base, end + refinement
    if places:
        wrong |= _decode(payload, rows, tiles, near)
    return wrong


def _decode(payload: torch.Tensor, rows: Sequence[Sequence[int]], tiles: int, near: bool) -> torch.Tensor:
    """Returns which pieces are not as the encoder makes them."""
    table = torch.tensor(rows, dtype=torch.int64).to(payload.device, non_blocking=True)
    counts = torch.empty(len(rows), tiles, dtype=torch.int32, device=payload.device)
    faults = torch.empty_like(counts)
    grid = (tiles, len(rows))
    _count_escapes[grid](payload, table, counts, tiles, _FIELDS, TILE)
    starts = counts.cumsum(1, dtype=torch.int32) - counts
    _decode_tiles[grid](payload, table, starts, faults, tiles, _FIELDS, TILE, near)
    return (counts.sum(1) != table[:, 3]) | faults.any(1)


# `tiles` differs from chunk to chunk; specialised for it, a kernel would be compiled anew in the middle of a load.
@triton.jit(do_not_specialize=["tiles"])
def _count_escapes(payload, table, counts, tiles, fields: tl.constexpr, tile_size: tl.constexpr):
    tile, piece = tl.program_id(0), tl.program_id(1)
    row = table + piece * fields
    numbers = tl.load(row + 5)
    codes = payload + tl.load(row) + tl.load(row + 4)
    at = tile * tile_size + tl.arange(0, tile_size)
    code = tl.load(codes + at, mask=at < numbers, other=0)
    tl.store(counts + piece * tiles + tile, tl.sum((((code >> 4) & 7) == 7).to(tl.int32), 0))


@triton.jit(do_not_specialize=["tiles"])
def _decode_tiles(
    payload, table, starts, faults, tiles, fields: tl.constexpr, tile_size: tl.constexpr, near: tl.constexpr
):
    tile, piece = tl.program_id(0), tl.program_id(1)
    row = table + piece * fields
    windows, rest, escapes = payload + tl.load(row), payload + tl.load(row + 1), payload + tl.load(row + 2)
    count, channels, numbers = tl.load(row + 3), tl.load(row + 4).to(tl.int32), tl.load(row + 5)
    out = tl.load(row + 6).to(tl.pointer_type(tl.uint16))
    at = tile * tile_size + tl.arange(0, tile_size)
    here = at < numbers
    code = tl.load(windows + channels + at, mask=here, other=0).to(tl.int32)
    top = tl.load(windows + at % tl.maximum(channels, 1), mask=here, other=6).to(tl.int32)
    below = (code >> 4) & 7
    escaped = below == 7
    place = tl.load(starts + piece * tiles + tile) + tl.cumsum(escaped.to(tl.int32), 0) - 1
    escape = tl.load(escapes + place, mask=escaped & (place < count), other=0).to(tl.int32)
    exponent = tl.where(escaped, escape, top - below)
    if near:
        low = tl.where((exponent == 0) | (exponent == 255), 0, 4)
    else:
        block, step, lane = at // 256, (at % 256) // 32, at % 32
        pairs = tl.load(rest + block * 96 + step // 4 * 32 + lane, mask=here, other=0).to(tl.int32)
        bits = tl.load(rest + block * 96 + 64 + lane, mask=here, other=0).to(tl.int32)
        low = ((pairs >> (2 * (step & 3))) & 3) | (((bits >> step) & 1) << 2)
    number = ((code & 0x80) << 8) | ((exponent & 0xFF) << 7) | ((code & 15) << 3) | low
    tl.store(out + at, number.to(tl.uint16), mask=here)
    wrong = (top < 6) | (top > 254) | (escaped & (place >= count))
    tl.store(faults + piece * tiles + tile, tl.max(wrong.to(tl.int32), 0))
