r"""Text from outside on its way to people: a server's words, the name of a file, an address that somebody wrote.

What is in it may be a secret (the password of a URL, a token that a server repeats), or meant for the terminal (a newline that
begins a forged line of a log, an escape sequence, a character that reverses what follows). `shown` takes both out. All that
goes to the log of `cake_hf` passes through it, and so does the reason in a report; errors and tables call it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
"""What stands for a secret."""

FEWEST_LETTERS = 4
"""A secret that is shorter is only found where a URL or a name tells what it is: as a word it would be found everywhere."""

FEWEST_OF_VARIABLES = 6
"""The same for values of variables of which only the name says that they are secret."""

MOST_SHOWN = 4000
"""Characters. Some servers answer with a whole page."""

_MOST_LOOKED_AT = 100_000
_MOST_CHAINED = 50

_MAY_HAVE_AT = re.compile(r"(?:file|gs|az|s3)://[a-z0-9._-]*(?:/.*)?|hf://[\w.-]+/[\w.-]+@[\w./-]+", re.DOTALL)
"""Where an @ may be a part of the path, or begin a revision. Anywhere else what stands before the last @ is a login."""

_HARMLESS = frozenset(
    ("admin", "budget", "db", "devices", "eviction", "host", "lend", "prefix", "protocol", "replicas", "ttl")
)
"""Options that may be shown with their values."""

_START = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(:/{0,2}|//)")
_URL = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}://\S*")
_LOGIN = re.compile(r"(?!\[)([^:]*):(?!\d*[^\w@%/]*$).*", re.DOTALL)
"""What stands where a host belongs, and has no port behind its colon."""

_NAMED = re.compile(
    r"(?i)(\b[\w-]{0,40}?(?:password|passwd|pwd|secret|token|credential|signature|authorization"
    r"|secret[_-]?(?:access[_-]?)?key|account[_-]?key|api[_-]?key)"
    r"(?:\s*=\s*|[\"']\s*:\s*))(?!(?:true|false|none)\b)(?:(?:bearer|basic)\s+)?[\"']?[^\s\"',;&)}\]]+"
)
_HEADER = re.compile(r"(?i)\b(authorization:\s*|bearer\s+)(?:(?:bearer|basic)\s+)?\S+")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SECRET_NAME = re.compile(r"(?i)(?:.*[_-])?(?:auth|key|pass|passwd|password|sas|secret|token)")


def shown(value: object, secrets: Iterable[str] = ()) -> str:
    """A text, or an error's, as a log, a report or a table may have it: in one line, and without secrets.

    Args:
        value: anything from outside.
        secrets: known ones, which are hidden wherever they stand.
    """
    try:
        text = str(value)
    except Exception:  # it comes from outside
        text = f"<{type(value).__name__}>"
    if not text:
        return text
    text = escaped(redacted(text[:_MOST_LOOKED_AT], secrets))
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def shown_url(text: str) -> str:
    """The text that names a store, as people may see it."""
    return shown(redacted_url(text))


def escaped(text: str, keep: str = "") -> str:
    r"""The text with each character that a terminal or a log would act on as an escape, such as \n or \x1b.

    Args:
        text: any.
        keep: such characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without the logins and options of URLs, without what is called a password or the like, and without secrets.

    Args:
        text: any.
        secrets: known ones; those of the environment are known in any case.
    """
    forms = {form for secret in (*secrets, *_secrets_of_the_environment()) for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    text = _URL.sub(lambda found: redacted_url(found[0]), text)
    text = _NAMED.sub(lambda found: found[1] + HIDDEN, text)
    text = _HEADER.sub(lambda found: found[1] + HIDDEN, text)
    return _TOKEN.sub(HIDDEN, text)


def redacted_url(url: str) -> str:
    """A URL, or something that was meant as one, without its login and without options whose values might be secrets.

    A secret may have any character in it, also those that end it for who reads the URL by the book. Where it cannot be told how
    far one goes, more is hidden.
    """
    head, mark, tail = re.fullmatch(r"([^?#]*)([?#]?)(.*)", url, re.DOTALL).groups()  # type: ignore[union-attr]  # always fits
    start = _START.match(head)
    if start is None:
        return head + _shown_options(mark, tail)
    rest = head[start.end() :]
    if start[1].lower() == "pack":
        return start[0] + redacted_url(rest + mark + tail)
    authority = rest.partition("/")[0]
    if rest.startswith("user:password@") and not mark:  # as our own advice has it
        return url
    is_place = _MAY_HAVE_AT.fullmatch(head) is not None
    if "@" in tail and not is_place:
        return f"{start[0]}{HIDDEN}"
    if "@" in rest and not is_place:
        return start[0] + rest.rpartition("@")[2] + _shown_options(mark, tail)
    login = _LOGIN.fullmatch(authority)
    if login:  # whose host was forgotten
        return f"{start[0]}{login[1]}:{HIDDEN}"
    return start[0] + rest + _shown_options(mark, tail)


def is_secret(name: str) -> bool:
    """Whether what is called so, an option or a variable, is a secret."""
    return _SECRET_NAME.fullmatch(name) is not None


def scrub(error: BaseException, secrets: Iterable[str] = ()) -> None:
    """Take secrets and control characters out of an error's texts and those that it came from; line breaks stay.

    To be called before an error of ours is raised from a client's, so that a traceback does not tell what our sentence hides.
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
    """The end of a URL from its ? or # on."""
    named = re.compile(r"(\w+)=[\w.%/-]*")
    parts = [named.fullmatch(part) for part in tail.split("&")]
    harmless = mark == "?" and all(part and part[1] in _HARMLESS for part in parts)
    return f"{mark}{tail}" if harmless or not tail else f"{mark}{HIDDEN}"


def _forms(secret: str) -> Iterator[str]:
    """How a secret may stand in a text."""
    plain = unquote(secret)
    for form in (secret, plain):
        if len(form) >= FEWEST_LETTERS:
            yield from (form, quote(form), quote(form, safe=""), quote_plus(form), repr(form)[1:-1], ascii(form)[1:-1])


def _secrets_of_the_environment() -> list[str]:
    return [value for name, value in os.environ.items() if is_secret(name) and len(value) >= FEWEST_OF_VARIABLES]


def _argument(part: object) -> object:
    return part if isinstance(part, (int, float)) else shown(part)


class _Harmless(logging.Filter):
    """Lets every record pass, after its texts have gone through `shown`."""

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
