"""The default chunk size: it depends on the kind of device and is deterministic, since it is part of the key.

The unstored rest of a prompt is shorter than a chunk and is computed each time. A CPU takes time for each token, so small
chunks pay off there; a GPU runs 512 tokens in hardly more time than 32, and small chunks leave it waiting for the next launch.
Smaller chunks also mean more files, forwards and rounding: in bfloat16, 4 of 60 answers of a small model differed from
single-shot `generate` with chunks of 128 and none with 512, as 5 of 60 did with another attention kernel
(eval/chunk_sizes.json).
"""

from __future__ import annotations

ON_CPU = 128
ON_OTHERS = 512


def auto_chunk_size(device_kind: str, *, ties_images: bool = False) -> int:
    """Returns the default number of tokens per chunk.

    Args:
        device_kind: the kind of device that computes, as torch names it: "cpu", "cuda", ...
        ties_images: whether the tokens of an image attend to each other in both directions, so that an image must not be cut
            and a chunk must be longer than an image.
    """
    return ON_CPU if device_kind == "cpu" and not ties_images else ON_OTHERS


def why(device_kind: str) -> str:
    """Returns the rule for that kind of device, in words."""
    if device_kind == "cpu":
        return f"{ON_CPU} tokens on a CPU, where what does not fill a chunk, and is computed each time, takes time per token"
    return f"{ON_OTHERS} tokens on {device_kind}, which runs as many in hardly more time than a few"
