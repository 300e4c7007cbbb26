"""Bytes and seconds as people read them."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """E.g. "512 B", "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def seconds_text(seconds: float) -> str:
    """Milliseconds below a second, since a restored prompt is often that fast."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def count_text(count: int, noun: str) -> str:
    """E.g. "1 chunk", "12,000 chunks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
