"""Interprets the text that names a store. A text that looks like a URL but is not one is never taken for a directory's name."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from cake_hf.errors import StoreError
from cake_hf.stores.default_budget import USUAL, FreeShare
from cake_hf.stores.eviction import LRU
from cake_hf.util.redaction import shown_url
from cake_hf.util.sizes import parse_bytes
from cake_hf.util.urls import split_options

LOCAL_EXAMPLES = {"file": "file:///path", "memory": "memory:4GB", "pack": "pack:folder"}
"""Examples of the kinds that need no server, by scheme."""

NO_BUDGET = "none"
"""Value of a URL's `budget` option for a directory without a limit."""

_ALIASES = {
    **dict.fromkeys(("disk", "dir", "directory", "folder", "local", "path"), "file"),
    **dict.fromkeys(("mem", "ram"), "memory"),
    **dict.fromkeys(("s3a", "s3n", "aws", "minio"), "s3"),
    **dict.fromkeys(("gcs", "gcp", "google"), "gs"),
    **dict.fromkeys(("azure", "abfs", "abfss", "wasb", "wasbs", "adl"), "az"),
    **dict.fromkeys(("hub", "huggingface", "hugging-face"), "hf"),
    **dict.fromkeys(("redis+tls", "redis+ssl", "redis-tls"), "rediss"),
    **dict.fromkeys(("redis-unix", "redis+socket", "unix"), "redis+unix"),
    **dict.fromkeys(("valkey", "valkeys"), "redis"),
}
"""Names that other software uses for these kinds."""

_AS_IT_IS = ("./", "../")
"""A text that starts with one of these is a directory, whatever its name looks like."""


@dataclass(frozen=True)
class Directory:
    """A directory, and the options of its URL.

    Attributes:
        path: the directory; a ~ is already expanded.
        budget: most bytes of chunks, or the share they are computed from; None for no limit.
        eviction: the order of eviction.
    """

    path: Path
    budget: int | FreeShare | None = USUAL
    eviction: str = LRU


def kind_of(text: str, examples: Mapping[str, str], listed: str) -> str:
    """Returns the scheme of a text that names a store; empty for a path.

    Args:
        text: the user's text.
        examples: example URLs of the remote kinds, by scheme.
        listed: all kinds that can be opened, for messages.

    Raises:
        StoreError: the text names no store; the message says what to write.
    """
    _refuse_invisible(text)
    if text.startswith((*_AS_IT_IS, "/", "~", "[")):
        return ""
    word, mark, rest = _split(text)
    known = {**examples, **LOCAL_EXAMPLES}
    if mark == ":" and word in known and rest.startswith("//") == (word not in ("memory", "pack")):
        return word
    if mark != ":" and word.lower() not in known:
        return ""
    if mark and re.fullmatch("[A-Za-z]", word):
        if os.name == "nt":
            return ""
        raise _windows(text)
    if meant := _meant(word, known, guess=mark == ":" and not rest.startswith("//")):
        raise _misspelt(text, meant, rest, examples)
    near = difflib.get_close_matches(word.lower(), known, 1, 0.5)
    hint = f" (is it {known[near[0]]}?)" if near else ""
    by_hand = "" if rest.startswith("//") else f" {_as_directory(text)}"
    raise StoreError(f"Unknown store URL {_said(text)}{hint}; known are {listed}.{by_hand}")


def plain_directory(text: str) -> Path:
    """Returns the directory that a path without a scheme names.

    Raises:
        StoreError: the text was probably not meant as a directory's name.
    """
    if text.startswith(_AS_IT_IS):
        return _not_to_be_expanded(text)
    _refuse_odd(text)
    return expanded(text, hint=True)


def path_directory(path: str | os.PathLike[str]) -> Path:
    """Returns the directory that a `pathlib.Path` names: unchanged, except that a first part ~ is expanded.

    Raises:
        StoreError: it cannot be a path, or the home directory is unknown.
    """
    text = os.fsdecode(path)
    if "\0" in text:
        raise StoreError(f"The store path {_said(text)} has a character of value 0 in it; no path can.")
    return expanded(text) if text.partition("/")[0] == "~" else _not_to_be_expanded(text)


def directory_url(url: str) -> Directory:
    """Parses a `file://` URL.

    Raises:
        StoreError: the URL names another host, is malformed, or has an invalid option.
    """
    written, _, query = url.partition("://")[2].partition("?")
    host, slash, path = written.partition("/")
    if host.lower() not in ("", "localhost", "~"):
        rights = ["file:///data/kv"] if "@" in url else [f"file:///{path}", f"file:///{host}{slash}{path}"]
        raise StoreError(
            f"{_said(url)} is on another host; a directory of this machine has three slashes: write "
            f"{' or '.join(map(_said, rights))}."
        )
    if "#" in url:
        raise StoreError(f"{_said(url)} has a # in it; write it as %23 where it is part of the directory's name.")
    if not slash + path or (host == "~" and not slash):
        raise StoreError("The store path is empty; give a directory, such as ~/.cache/cake_hf.")
    decoded = os.fsdecode(unquote_to_bytes(slash + path))
    if os.name != "nt" and re.match(r"/[A-Za-z]:(?:[/\\]|$)", decoded):
        raise _windows(url)
    if decoded.startswith("/~/"):
        raise StoreError(f"{_said(url)} has no home directory in it; write {_said('file://' + path)}.")
    if _SHELL_VARIABLE.search(written):
        raise _variable(url)
    directory = expanded(f"~{decoded}") if host == "~" else path_directory(decoded)
    return Directory(directory, *_options(query))


def bytes_of(text: str) -> int:
    """Parses a size like `parse_bytes`, with StoreErrors.

    Raises:
        StoreError: the text is not a size.
    """
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise StoreError(str(error)) from error


def expanded(path: str | os.PathLike[str], *, hint: bool = False) -> Path:
    """Returns the path with a leading ~ replaced by the home directory.

    Args:
        path: any path.
        hint: whether the message explains how to write a directory whose name starts with ~.

    Raises:
        StoreError: the home directory is unknown.
    """
    text = os.fspath(path)
    user, slash, rest = text.partition("/")
    if not user.startswith("~"):
        return Path(text)
    home = os.path.expanduser(user)
    nowhere = user == "~" and os.environ.get("HOME") == ""
    if nowhere or not os.path.isabs(home):
        whose = "the home directory, for which ~ stands" if user == "~" else f"a user with the home {_said(user)}"
        how = f" For a directory of that name write {_said('./' + text)}." if hint else ""
        raise StoreError(f"There is no way to find {whose}: set HOME, or give an absolute path.{how}")
    return Path(home + slash + rest)


def _not_to_be_expanded(text: str) -> Path:
    path = Path(text)
    return path.absolute() if str(path).startswith("~") else path


def _options(query: str) -> tuple[int | FreeShare | None, str]:
    """Returns budget and eviction from the query of a directory's URL."""
    try:
        options = split_options(query)
    except ValueError as error:
        raise StoreError(f"The options of a directory's URL make no sense: {error}.") from error
    budget, eviction = options.pop("budget", None), options.pop("eviction", LRU)
    if options:
        raise StoreError(f"A directory has no option {next(iter(options))!r}; known are budget and eviction.")
    if budget is None:
        return USUAL, eviction
    return None if budget.lower() == NO_BUDGET else bytes_of(budget), eviction


_SHELL_VARIABLE = re.compile(r"\$(?:[A-Za-z_]|\{)")
_VARIABLE = re.compile(rf"{_SHELL_VARIABLE.pattern}|%[A-Za-z_]{{3,}}%")


def _refuse_invisible(text: str) -> None:
    if not text.strip() or text in ("file:", "file://"):
        raise StoreError("The store path is empty; give a directory, such as ~/.cache/cake_hf.")
    # In a path, a surrogate may stand for a byte that is not valid text; in a URL it has no meaning.
    none = ("Cc", "Cs", "Zl", "Zp") if "://" in text else ("Cc", "Zl", "Zp")
    if text != text.strip() or any(unicodedata.category(c) in none for c in text):
        raise StoreError(
            f"{_said(text)} has a space at an end, or a line break or the like in it; write the store without it. "
            f"{_as_directory(text)}"
        )


def _refuse_odd(text: str) -> None:
    """Raises if the text has something in it that is hardly meant as part of a directory's name."""
    if "?" in text:
        path, _, query = text.partition("?")
        right = f"file://{quote(os.fspath(expanded(path, hint=True).absolute()))}?{query}"
        raise StoreError(f"A path has no options; write {_said(right)} instead of {_said(text)}. {_as_directory(text)}")
    if "\\" in text and os.name != "nt":
        raise _windows(text)
    if _VARIABLE.search(text):
        raise _variable(text)
    if text.startswith("["):
        raise StoreError(
            f"{_said(text)} is no list, but a text; a list of stores is written in Python. {_as_directory(text)}"
        )


def _variable(text: str) -> StoreError:
    home = re.sub(r"^\$(?:HOME|\{HOME\})(?=/|$)", "~", text)
    right = _said(home) if home != text else f"os.path.expandvars({_said(text)})"
    return StoreError(f"Variables are not filled in: write {right} instead of {_said(text)}. {_as_directory(text)}")


def _windows(text: str) -> StoreError:
    return StoreError(
        f"{_said(text)} is a path of Windows; write one of this machine, such as /data/kv. {_as_directory(text)}"
    )


def _split(text: str) -> tuple[str, str, str]:
    """Splits a text at a : in its first part, or at a // right after it; returns the text before, the mark, and the rest."""
    found = re.match(r"([^/:]*)(:|//)(.*)", text, re.DOTALL)
    return (found[1], found[2], found[3]) if found else (text, "", "")


def _meant(word: str, known: Collection[str], *, guess: bool) -> str:
    """Returns the scheme that the user probably means by a word; empty if there is none."""
    lower = word.lower().strip()
    meant = lower if lower in known else _ALIASES.get(lower, "")
    near = [] if meant or not guess else difflib.get_close_matches(lower, known, 1, 0.7)
    return meant or next(iter(near), "")


def _misspelt(text: str, scheme: str, rest: str, examples: Mapping[str, str]) -> StoreError:
    right = _right_form(scheme, rest, examples)
    return StoreError(f"{_said(text)} is no store; write {_said(right)}. {_as_directory(text)}")


def _right_form(scheme: str, rest: str, examples: Mapping[str, str]) -> str:
    """Returns the correct spelling of a misspelled store."""
    bare = rest.lstrip(":/")
    if not bare:
        return {**examples, **LOCAL_EXAMPLES, "memory": "memory:"}[scheme]
    if scheme == "memory":
        return f"memory:{bare}"
    path = rest.lstrip(":").removeprefix("//")
    if scheme == "pack":
        return f"pack:{path}"
    if scheme == "file":
        plain, mark, query = path.partition("?")
        return f"file://{_absolute(plain)}{mark}{query}"
    return f"{scheme}://{'/' if scheme == 'redis+unix' else ''}{bare}"


def _absolute(path: str) -> str:
    """Returns an absolute path for a file URL; text that is already encoded stays so."""
    if path.startswith(("/", "~/")):
        return path
    return quote(os.fspath(Path(path).absolute()), safe="/%")


def _as_directory(text: str) -> str:
    """Returns a sentence that says how to name a directory that really has this name."""
    is_odd = text.startswith(("/", "~", "file:")) or "://" in text or text != text.strip() or not text.isprintable()
    with_dot = "" if is_odd else f"write './{shown_url(text)}', or "
    return f"For a directory of that name {with_dot}pass a pathlib.Path."


def _said(text: str) -> str:
    return f"'{shown_url(text)}'"
