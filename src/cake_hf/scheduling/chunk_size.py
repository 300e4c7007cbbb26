"""The number of tokens in a chunk by default: by the kind of device, and deterministic, since it is part of the key.

What is not stored of a prompt is less than a chunk, and is computed each time. A CPU takes time for each token, so small chunks
pay there; a GPU runs 512 tokens in hardly more time than 32, and small chunks leave it waiting for the next launch. The smaller
they are, the more files, forwards and roundings there are.
"""

from __future__ import annotations

ON_CPU = 128
ON_OTHERS = 512


def auto_chunk_size(device_kind: str, *, ties_images: bool = False) -> int:
    """Tokens of a chunk.

    Args:
        device_kind: that computes, as torch names it: "cpu", "cuda", ...
        ties_images: tokens of an image see each other in both directions, so that it must not be cut, and a chunk has to be
            longer than one.
    """
    return ON_CPU if device_kind == "cpu" and not ties_images else ON_OTHERS


def why(device_kind: str) -> str:
    """The rule in words, for that kind of device."""
    if device_kind == "cpu":
        return f"{ON_CPU} tokens on a CPU, where what does not fill a chunk, and is computed each time, takes time per token"
    return f"{ON_OTHERS} tokens on {device_kind}, which runs as many in hardly more time than a few"
