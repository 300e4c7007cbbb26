r"""Redaction of text from outside before a person sees it: a server's message, a file name, a URL that a user wrote.

Such text may contain a secret (the password of a URL, a token that a server repeats) or control the terminal (a newline that
starts a forged log line, an escape sequence, a character that reverses the following text). `shown` removes both. Everything
that goes to the `cake_hf` log passes through it, and so does the reason in a report; errors and tables call it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
"""The replacement for a secret."""

FEWEST_LETTERS = 4
"""A shorter secret is found only where a URL or a name identifies it: as a plain word it would match everywhere."""

FEWEST_OF_VARIABLES = 6
"""The same for values of environment variables that are secret only by their name."""

MOST_SHOWN = 4000
"""In characters. Some servers answer with a whole page."""

_MOST_LOOKED_AT = 100_000
_MOST_CHAINED = 50

_MAY_HAVE_AT = re.compile(r"(?:file|gs|az|s3)://[a-z0-9._-]*(?:/.*)?|hf://[\w.-]+/[\w.-]+@[\w./-]+", re.DOTALL)
"""URLs in which an @ may be part of the path, or start a revision. In any other URL the text before the last @ is a login."""

_HARMLESS = frozenset(
    ("admin", "budget", "db", "devices", "eviction", "host", "lend", "prefix", "protocol", "replicas", "ttl")
)
"""Options that may be shown with their values."""

_START = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(:/{0,2}|//)")
_URL = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}://\S*")
_LOGIN = re.compile(r"(?!\[)([^:]*):(?!\d*[^\w@%/]*$).*", re.DOTALL)
"""Text in the place of a host whose colon is not followed by a port."""

_NAMED = re.compile(
    r"(?i)(\b[\w-]{0,40}?(?:password|passwd|pwd|secret|token|credential|signature|authorization"
    r"|secret[_-]?(?:access[_-]?)?key|account[_-]?key|api[_-]?key)"
    r"(?:\s*=\s*|[\"']\s*:\s*))(?!(?:true|false|none)\b)(?:(?:bearer|basic)\s+)?[\"']?[^\s\"',;&)}\]]+"
)
_HEADER = re.compile(r"(?i)\b(authorization:\s*|bearer\s+)(?:(?:bearer|basic)\s+)?\S+")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SECRET_NAME = re.compile(r"(?i)(?:.*[_-])?(?:auth|key|pass|passwd|password|sas|secret|token)")


def shown(value: object, secrets: Iterable[str] = ()) -> str:
    """Returns a text, or an error's text, in a form fit for a log, a report or a table: on one line, without secrets.

    Args:
        value: anything from outside.
        secrets: known secrets, which are hidden wherever they occur.
    """
    try:
        text = str(value)
    except Exception:  # the object comes from outside
        text = f"<{type(value).__name__}>"
    if not text:
        return text
    text = escaped(redacted(text[:_MOST_LOOKED_AT], secrets))
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def shown_url(text: str) -> str:
    """Returns the text that names a store, in a form that users may see."""
    return shown(redacted_url(text))


def escaped(text: str, keep: str = "") -> str:
    r"""Returns the text with an escape, such as \n or \x1b, for each character that a terminal or a log would act on.

    Args:
        text: any text.
        keep: characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """Returns the text without URL logins and options, values named as a password or the like, and known secrets.

    Args:
        text: any text.
        secrets: known secrets; those of the environment are always known.
    """
    forms = {form for secret in (*secrets, *_secrets_of_the_environment()) for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    text = _URL.sub(lambda found: redacted_url(found[0]), text)
    text = _NAMED.sub(lambda found: found[1] + HIDDEN, text)
    text = _HEADER.sub(lambda found: found[1] + HIDDEN, text)
    return _TOKEN.sub(HIDDEN, text)


def redacted_url(url: str) -> str:
    """Returns a URL, or a text meant as one, without its login and without options whose values might be secrets.

    A secret may contain any character, even one that would end it by the URL standard. If the end of a secret is unclear, more
    of the text is hidden.
    """
    head, mark, tail = re.fullmatch(r"([^?#]*)([?#]?)(.*)", url, re.DOTALL).groups()  # type: ignore[union-attr]  # always fits
    start = _START.match(head)
    if start is None:
        return head + _shown_options(mark, tail)
    rest = head[start.end() :]
    if start[1].lower() == "pack":
        return start[0] + redacted_url(rest + mark + tail)
    authority = rest.partition("/")[0]
    if rest.startswith("user:password@") and not mark:  # the placeholder that our own messages use
        return url
    is_place = _MAY_HAVE_AT.fullmatch(head) is not None
    if "@" in tail and not is_place:
        return f"{start[0]}{HIDDEN}"
    if "@" in rest and not is_place:
        return start[0] + rest.rpartition("@")[2] + _shown_options(mark, tail)
    login = _LOGIN.fullmatch(authority)
    if login:  # a login without a host
        return f"{start[0]}{login[1]}:{HIDDEN}"
    return start[0] + rest + _shown_options(mark, tail)


def is_secret(name: str) -> bool:
    """Returns whether an option or a variable of that name is a secret."""
    return _SECRET_NAME.fullmatch(name) is not None


def scrub(error: BaseException, secrets: Iterable[str] = ()) -> None:
    """Removes secrets and control characters from the texts of an error and of its causes; line breaks stay.

    It must be called before one of our errors is raised from a client's, so that a traceback does not reveal what our message
    hides.
    """
    for one in _chain(error):
        one.args = tuple(_scrubbed(part, secrets) if isinstance(part, str) else part for part in one.args)
        if isinstance(one, OSError) and isinstance(one.strerror, str):
            one.strerror = _scrubbed(one.strerror, secrets)


def _scrubbed(text: str, secrets: Iterable[str]) -> str:
    return escaped(redacted(text[:_MOST_LOOKED_AT], secrets), keep="\n\t")


def _chain(error: BaseException) -> Iterator[BaseException]:
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_CHAINED:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        yield one


def _shown_options(mark: str, tail: str) -> str:
    """Returns the end of a URL, from its ? or # on, hidden unless all options are harmless."""
    named = re.compile(r"(\w+)=[\w.%/-]*")
    parts = [named.fullmatch(part) for part in tail.split("&")]
    harmless = mark == "?" and all(part and part[1] in _HARMLESS for part in parts)
    return f"{mark}{tail}" if harmless or not tail else f"{mark}{HIDDEN}"


def _forms(secret: str) -> Iterator[str]:
    """Yields the forms in which a secret may occur in a text."""
    plain = unquote(secret)
    for form in (secret, plain):
        if len(form) >= FEWEST_LETTERS:
            yield from (form, quote(form), quote(form, safe=""), quote_plus(form), repr(form)[1:-1], ascii(form)[1:-1])


def _secrets_of_the_environment() -> list[str]:
    return [value for name, value in os.environ.items() if is_secret(name) and len(value) >= FEWEST_OF_VARIABLES]


def _argument(part: object) -> object:
    return part if isinstance(part, (int, float)) else shown(part)


class _Harmless(logging.Filter):
    """Passes every record, after `shown` has cleaned its texts."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.args:
            record.msg = shown(record.msg)
        elif isinstance(record.args, tuple):
            record.args = tuple(map(_argument, record.args))
        else:
            record.args = {name: _argument(part) for name, part in record.args.items()}
        if record.exc_info and record.exc_info[1] is not None:
            scrub(record.exc_info[1])
        return True


logging.getLogger("cake_hf").addFilter(_Harmless())
