"""Reads traces, one JSON object per line, in either of two formats. What a line lacks is told with the line's number.

Mooncake's traces (Qin et al., FAST 2025; github.com/kvcache-ai/Mooncake, folder FAST25-release):

    timestamp       milliseconds
    input_length    tokens of the prompt
    output_length   tokens of the answer
    hash_ids        a number for each block of 512 tokens, the last one maybe not full; two prompts that begin with the same
                    numbers begin with the same tokens

Token counts:

    time            seconds
    prefix          name (text or number) of the text that the prompt begins with; may be missing if prefix_tokens is 0
    prefix_tokens   how many of that text's tokens the prompt begins with
    new_tokens      tokens of the prompt after these
    output_tokens   tokens of the answer
    appends         optional: whether the new tokens become part of that text, as in a conversation; by default they are this
                    prompt's own

Fields with other names are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.traces.requests import BLOCK, Numbering, Request, Trace, by_time, full_blocks

MOST_TOKENS = 16 * 2**20
MOST_SECONDS = 1e9


class BrokenTrace(ValueError):
    """A trace cannot be used; the message is one sentence, with the number of the line."""


def read_trace(path: Path) -> Trace:
    """Returns the trace in a file. The first line decides which of the two formats it has.

    Raises:
        BrokenTrace: the file is not readable or empty, or a line lacks a field or has a wrong value in it.
    """
    numbering, requests = Numbering(), []
    parse = None
    for line, text in _lines(path):
        fields = Fields(_object(path, line, text), f"{path.name}, line {line}")
        parse = parse or (_mooncake if "hash_ids" in fields.values or "timestamp" in fields.values else _counts)
        requests.append(parse(fields, numbering, line))
    if not requests:
        raise BrokenTrace(f"{path.name} has no requests.")
    return by_time(path.stem, requests)


class Fields:
    """The fields of one line.

    Args:
        values: as parsed.
        where: file and line, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self._where = values, where

    def count(self, name: str, least: int = 0) -> int:
        """Returns a number of tokens."""
        value = self._value(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST_TOKENS:
            raise self.broken(f"{name!r} must be a whole number from {least} to {MOST_TOKENS}, got {_short(value)}")
        return value

    def seconds(self, name: str, per_second: float = 1.0) -> float:
        """Returns a time in seconds."""
        value = self._value(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= MOST_SECONDS * per_second:
            raise self.broken(f"{name!r} must be a time, a number not below 0, got {_short(value)}")
        return float(value / per_second)

    def hashes(self, name: str) -> list[int]:
        """Returns a list of whole numbers."""
        value = self._value(name)
        if not isinstance(value, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
            raise self.broken(f"{name!r} must be a list of whole numbers, got {_short(value)}")
        return value

    def name(self, name: str) -> Hashable:
        """Returns the name of a text."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise self.broken(f"{name!r} must be a text or a whole number, got {_short(value)}")
        return value

    def flag(self, name: str) -> bool:
        """Returns true or false; false if the field is missing."""
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise self.broken(f"{name!r} must be true or false, got {_short(value)}")
        return value

    def broken(self, what: str) -> BrokenTrace:
        """Returns the error that says what is wrong."""
        return BrokenTrace(f"{self._where}: {what}.")

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise self.broken(f"there is no {name!r}")
        return self.values[name]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BrokenTrace(f"The trace {path} cannot be read ({error.strerror or error}).") from error
    for line, raw in enumerate(content.split(b"\n"), 1):
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BrokenTrace(f"{path.name}, line {line}: it is not UTF-8 text.") from error
        if text.strip():
            yield line, text


def _object(path: Path, line: int, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenTrace(f"{path.name}, line {line}: it is not JSON ({_reason(error)}).") from error
    if not isinstance(value, Mapping):
        raise BrokenTrace(f"{path.name}, line {line}: it is not a JSON object.")
    return value


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__


def _mooncake(fields: Fields, numbering: Numbering, line: int) -> Request:
    tokens, hashes = fields.count("input_length", least=1), fields.hashes("hash_ids")
    needed = -(-tokens // BLOCK)
    if len(hashes) != needed:
        raise fields.broken(f"{tokens} tokens have {needed} blocks of {BLOCK}, but 'hash_ids' has {len(hashes)}")
    blocks = numbering.number(hashes[: full_blocks(tokens)])
    return Request(fields.seconds("timestamp", 1e3), blocks, tokens, fields.count("output_length"))


def _counts(fields: Fields, numbering: Numbering, line: int) -> Request:
    shared, new = fields.count("prefix_tokens"), fields.count("new_tokens")
    if shared + new < 1:
        raise fields.broken("the prompt has no tokens")
    appends = fields.flag("appends")
    is_named = shared or appends or fields.values.get("prefix") is not None
    text = fields.name("prefix") if is_named else None
    tokens = shared + new
    names = [
        ("text", text, index) if appends or (index + 1) * BLOCK <= shared else ("own", line, index)
        for index in range(full_blocks(tokens))
    ]
    return Request(fields.seconds("time"), numbering.number(names), tokens, fields.count("output_tokens"))


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
