"""The `CAKE_HF_*` variables: defaults that are set from outside a program. They are read here and nowhere else.

docs/environment.md describes each variable. An explicit argument overrides its variable, and an empty variable counts as unset.
Settings that change which KV is found (chunk size, salt, exactness) have no variable on purpose: a prompt saved in one shell
would silently not be found in another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from cake_hf.util.sizes import parse_seconds

T = TypeVar("T")

STORE = "CAKE_HF_STORE"


def limit_variable(name: str) -> str:
    """Returns the name of the variable for a field of `Limits`."""
    return f"CAKE_HF_{name.upper()}"


def text_from(variable: str) -> str | None:
    """Returns a variable's value; None if the variable is unset or empty."""
    return os.environ.get(variable, "").strip() or None


def value_from(variable: str, parse: Callable[[str], T]) -> T | None:
    """Returns a variable's parsed value; None if the variable is unset or empty.

    Raises:
        ValueError: the value cannot be parsed; the message names the variable.
    """
    text = text_from(variable)
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{variable} cannot be used: {error}") from error


def a_count(text: str) -> int:
    """Parses a whole number above 0.

    Raises:
        ValueError: the text is not such a number.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise ValueError(f"{text!r} is not a whole number above 0; write it like 4.")
    return int(text)


def some_seconds(text: str) -> float:
    """Parses a number of seconds, or a time with its unit, such as "1m".

    Raises:
        ValueError: the text is neither.
    """
    try:
        return parse_seconds(text if text[-1:].isalpha() else f"{text}s")
    except ValueError:
        raise ValueError(f"{text!r} is not a time above 0; write it like 10, 2.5 or 1m.") from None
