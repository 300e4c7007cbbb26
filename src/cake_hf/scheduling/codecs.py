"""Which form of chunks loads sooner, and which one still arrives in time. Pure arithmetic on what is believed."""

from __future__ import annotations

from collections.abc import Sequence

from cake_hf.scheduling.costs import MAX_BYTES, CodecCost, Costs, LoadCost

GIGA = 1e9

RAW = CodecCost(1.0, float(MAX_BYTES))
"""Chunks as they are."""

TYPICAL = {
    "lossless": CodecCost(0.70, 5.0 * GIGA),
    "near": CodecCost(0.51, 6.0 * GIGA),
    "int8": CodecCost(0.52, 5.5 * GIGA),
    "int4": CodecCost(0.31, 5.0 * GIGA),
}
"""What codecs take for bfloat16 KV where nothing was measured: sizes of real KV, and one thread of an x86 CPU with AVX2."""


BASE_SHARE = 17 / 32
"""Bytes of a base over those of its piece, at most as a rule: a byte of 2 per number, and 1/32 for windows and escapes."""


def levels_of(codec: CodecCost | None) -> tuple[CodecCost, CodecCost]:
    """Returns what a chunk of the lossless codec takes whole, and its bases alone; `codec` is the former as measured."""
    whole = codec or TYPICAL["lossless"]
    return whole, CodecCost(min(BASE_SHARE, whole.ratio), whole.speed)


def encoding_pays(costs: Costs) -> bool:
    """Returns whether encoded chunks load no slower than raw ones; True while that is not known.

    A load of S raw bytes with r*S encoded ones, latency q, bandwidth B, decode speed D and k threads takes, in steady flow,
    `max(r*S/B, (q + r*S/B + S/D) / k)`, and a raw one `max(S/B, (q + S/B) / k)`. So it never pays where `k*D < B`: then
    `S/D > k*S/B`, and an encoded load takes longer than `q/k + S/B`, which is no less than what a raw one takes.

    Args:
        costs: of raw chunks.
    """
    if costs.load is None or costs.codec is None:
        return True
    return costs.codec.load(costs.load).interval <= costs.load.interval


def finest(loads: Sequence[LoadCost], left: int, seconds: float) -> int | None:
    """Returns the first of several forms in which the remaining chunks arrive in time; None if there is none.

    That is CacheGen's adaptation (Liu et al., SIGCOMM 2024): of the forms with `left * interval <= seconds`, the finest.

    Args:
        loads: what loading costs now in each form, the finest first.
        left: chunks that are not there.
        seconds: until they have to be.
    """
    return next((form for form, load in enumerate(loads) if left * load.interval <= seconds), None)
