"""The `CAKE_HF_*` variables: defaults that are set from outside of a program. They are read here and nowhere else.

What each means: docs/environment.md. An explicit argument goes before its variable, an empty variable counts as none. What
changes which KV is found (chunk size, salt, exactness) has no variable on purpose: a prompt that was saved in one shell would
silently not be found in another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from cake_hf.util.sizes import parse_seconds

T = TypeVar("T")

STORE = "CAKE_HF_STORE"


def limit_variable(name: str) -> str:
    """The variable of a field of `Limits`."""
    return f"CAKE_HF_{name.upper()}"


def text_from(variable: str) -> str | None:
    """What a variable is set to; None where it is not, or to nothing."""
    return os.environ.get(variable, "").strip() or None


def value_from(variable: str, parse: Callable[[str], T]) -> T | None:
    """As `text_from`, parsed.

    Raises:
        ValueError: it cannot be; the sentence names the variable.
    """
    text = text_from(variable)
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{variable} cannot be used: {error}") from error


def a_count(text: str) -> int:
    """A whole number above 0.

    Raises:
        ValueError: it is none.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise ValueError(f"{text!r} is not a whole number above 0; write it like 4.")
    return int(text)


def some_seconds(text: str) -> float:
    """Seconds, or a time with its unit, such as "1m".

    Raises:
        ValueError: it is neither.
    """
    try:
        return parse_seconds(text if text[-1:].isalpha() else f"{text}s")
    except ValueError:
        raise ValueError(f"{text!r} is not a time above 0; write it like 10, 2.5 or 1m.") from None
