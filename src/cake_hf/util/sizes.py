"""Sizes, times and shares in human-readable form."""

from __future__ import annotations

import re
from threading import TIMEOUT_MAX

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_NUMBER = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z%]*)")

MOST_QUOTED = 60
"""Characters of an invalid text that an error quotes."""

MOST_BYTES = 2**63
"""The lowest size that is rejected: more than any machine can count to."""


def parse_bytes(text: str) -> int:
    """Parses a size, e.g. "4GB", "512 MiB", "1000".

    Raises:
        ValueError: the text is not a size, or the size is less than a byte.
    """
    match = _NUMBER.fullmatch(text.strip())
    unit = _BYTES.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit >= MOST_BYTES:
        raise ValueError(f"{text[:MOST_QUOTED]!r} is not a size; write it like 4GB or 512MiB.")
    if not (nbytes := int(float(match[1]) * unit)):
        raise ValueError(f"{text[:MOST_QUOTED]!r} is room for nothing; give a size like 4GB.")
    return nbytes


def parse_seconds(text: str) -> float:
    """Parses a time, e.g. "30d", "12h", "90s".

    Raises:
        ValueError: the text is not a time, or the time is zero.
    """
    match = _NUMBER.fullmatch(text.strip())
    unit = _SECONDS.get(match[2].lower()) if match else None
    if match is None or unit is None or not 0 < float(match[1]) * unit <= TIMEOUT_MAX:
        raise ValueError(f"{text[:MOST_QUOTED]!r} is not a time; write it like 30d, 12h or 45m.")
    return float(match[1]) * unit


def parse_share(text: str) -> float:
    """Parses a share, e.g. "5%"; returns a number between 0 (excluded) and 1.

    Raises:
        ValueError: the text is not a share.
    """
    match = _NUMBER.fullmatch(text.strip())
    share = float(match[1]) / 100 if match and match[2] == "%" else 0.0
    if not 0 < share <= 1:
        raise ValueError(f"{text[:MOST_QUOTED]!r} is not a share; write it like 5% or 100%.")
    return share


def bytes_text(count: float) -> str:
    """Returns a size as text, e.g. "512 B", "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def seconds_text(seconds: float) -> str:
    """Returns a time as text, in milliseconds below a second, since a restored prompt is often that fast."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def count_text(count: int, noun: str) -> str:
    """Returns a count with its noun, e.g. "1 chunk", "12,000 chunks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
