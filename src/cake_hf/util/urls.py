"""Parsing of store URLs. Messages about a malformed URL quote no part that might be a secret."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote, unquote_plus

_WHOLE = re.compile(r"([^:]*)://([^/?]*)([^?]*)\??(.*)", re.DOTALL)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[\w.-]+)(?::(\d{1,5}))?")
_OPTION = re.compile(r"[A-Za-z_][\w.-]{0,39}")
_ENCODE = "write / ? # @ in a user name, a password, a path or an option as %2F %3F %23 %40"


@dataclass(frozen=True)
class Url:
    """The parts of `scheme://login@host:port/path?options`.

    Attributes:
        scheme: as written.
        login: user and password, not decoded; a secret.
        place: host and port, not decoded.
        path: with its slash, not decoded.
        options: decoded.
    """

    scheme: str
    login: str = field(repr=False)
    place: str
    path: str
    options: dict[str, str] = field(repr=False)

    @property
    def user(self) -> str:
        """The user name, decoded."""
        return unquote(self.login.partition(":")[0])

    @property
    def password(self) -> str:
        """The password, decoded."""
        return unquote(self.login.partition(":")[2])

    def host_and_port(self, port: int) -> tuple[str, int]:
        """Returns the host as written, and the port, by default the given one.

        Raises:
            ValueError: the host is missing or malformed, or the port is invalid.
        """
        found = _HOST.fullmatch(self.place)
        number = int(found[2]) if found and found[2] else port
        if found is None or not 0 < number < 2**16 or not _is_name(found[1]):
            raise ValueError(f"it needs a host, and its port is a number, such as host:{port}")
        return found[1], number


def _is_name(host: str) -> bool:
    """Returns whether a resolver accepts a host name; for others, resolving raises an error of Python's own."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def split_url(url: str, *, at_in_path: bool = False) -> Url:
    """Splits a URL into its parts.

    Args:
        url: with "://" in it.
        at_in_path: whether the path may contain an @. Otherwise an @ there is a sign of a password that was not encoded.

    Raises:
        ValueError: the URL is malformed; the message is a clause.
    """
    found = _WHOLE.fullmatch(url)
    if found is None:
        raise ValueError("it has no ://")
    scheme, authority, path, query = found.groups()
    login, _, place = authority.rpartition("@")
    path_may = at_in_path and not login and ":" not in place
    if "#" in url or "@" in query or ("@" in path and not path_may):
        raise ValueError(_ENCODE)
    return Url(scheme, login, place, path, split_options(query))


def refuse_no_server(url: str) -> None:
    """Rejects a URL that is not the address of an HTTP server, before a client does so and quotes a part of a password.

    Raises:
        ValueError: the URL is not such an address; the message is a clause.
    """
    told = split_url(url, at_in_path=True)
    told.host_and_port(443)
    if told.scheme not in ("http", "https") or not url.isascii() or any(c.isspace() for c in url):
        raise ValueError("it needs http:// or https://, and no blanks")


def split_options(query: str) -> dict[str, str]:
    """Parses the options after the ? of a URL.

    Raises:
        ValueError: they are not `name=value` pairs separated by &, or a name occurs twice.
    """
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, equals, value = part.partition("=")
        if not equals or not _OPTION.fullmatch(name):
            raise ValueError("behind the ? stands name=value, with an & between any two")
        if name in options:
            raise ValueError(f"the option {name!r} stands there twice")
        options[name] = unquote_plus(value)
    return options
