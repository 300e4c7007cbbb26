"""Bytes and seconds as people read them."""

from __future__ import annotations

from cake_hf.arithmetic.sizes import bytes_text

__all__ = ["bytes_text", "count_text", "seconds_text"]


def seconds_text(seconds: float) -> str:
    """Milliseconds below a second, since a restored prompt is often that fast."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def count_text(count: int, noun: str) -> str:
    """E.g. "1 chunk", "12,000 chunks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
