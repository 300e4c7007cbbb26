"""Sets up the client of a Redis store, and explains its errors."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import quote, urlencode

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)
from redis.retry import Retry

from cake_hf.errors import StoreError
from cake_hf.util.redaction import scrub, shown, shown_url
from cake_hf.util.urls import Url, split_url

CONNECT_SECONDS = 5.0

_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_SECRET_OPTIONS = ("password", "ssl_password", "ssl_ca_data", "username")
"""Options of redis-py whose values are secrets."""


@dataclass(frozen=True)
class RedisAddress:
    """A parsed URL of a Redis store.

    Attributes:
        url: URL for redis-py; may contain a password.
        place: URL for people, without a password.
        prefix: prefix of our keys' names.
        ttl: seconds that a value lives; None to leave it to the server.
        secrets: texts that must not be shown.
    """

    url: str = field(repr=False)
    place: str
    prefix: str
    ttl: int | None
    secrets: tuple[str, ...] = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """Parses a URL and separates our options from those of redis-py.

        Raises:
            StoreError: the URL, or one of our options, is invalid.
        """
        try:
            told = split_url(url)
            where = _where(told)
        except ValueError as error:
            # In an invalid URL the end of a password is unknown, so it is not quoted.
            whole = shown_url(url) if "@" not in url else "given"
            raise StoreError(f"The Redis URL {whole} makes no sense: {error}.") from None
        place, options = f"{told.scheme}://{where}", dict(told.options)
        prefix, ttl = options.pop("prefix", "cake_hf"), options.pop("ttl", None)
        if not re.fullmatch(r"[A-Za-z0-9_.:-]+", prefix):
            raise StoreError(f"The prefix {prefix!r} in {place} may only have letters, digits and _ . : - in it.")
        if ttl is not None and not re.fullmatch(r"[1-9]\d{0,8}", ttl):
            raise StoreError(f"The ttl {ttl!r} in {place} is not a number of seconds; write it like ttl=86400.")
        for name in _FILES:
            if name in options and not os.path.exists(options[name]):
                raise StoreError(f"The file that {name} names in the URL of {place} is not there; check the path.")
        login = ":".join(quote(part, safe="") for part in (told.user, told.password)) + "@" if told.login else ""
        plain = f"{told.scheme.removeprefix('redis+')}://{login}{where}?{urlencode(options)}"
        hidden = (told.password or told.user, *(options[name] for name in _SECRET_OPTIONS if name in options))
        return cls(plain, place, prefix, None if ttl is None else int(ttl), tuple(filter(None, hidden)))

    def pool(self, timeout: float) -> redis.ConnectionPool:
        """Makes a pool of connections to the server, without connecting yet.

        Args:
            timeout: seconds to wait for an answer.

        Raises:
            StoreError: redis-py rejects the URL.
        """
        defaults = {"socket_timeout": timeout, "socket_connect_timeout": min(CONNECT_SECONDS, timeout)}
        # One retry, for a connection that has gone stale. More retries, with pauses, would only delay the prompt.
        once_more = Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,))
        fixed = {"protocol": 2, "decode_responses": False, "retry": once_more}
        try:
            told = cast(Callable[[str], dict[str, Any]], parse_url)(self.url)
            pool = redis.ConnectionPool(**{**defaults, **told, **fixed})
            pool.connection_class(**pool.connection_kwargs)  # validates the options without connecting
        except (ValueError, TypeError, RedisError) as error:
            said = shown(error, self.secrets)
            hidden = self.secrets
            if unknown := re.search(r"unexpected keyword argument '(\w+)'", said):
                said = f"there is no option {unknown[1]!r}."
                if hidden:  # the option's name may be the end of a password
                    said, hidden = "there is no such option; write an & in a password as %26.", (*hidden, unknown[1])
            scrub(error, hidden)
            raise StoreError(f"The Redis URL {self.place} or one of its options makes no sense: {said}") from error
        return pool


def _where(told: Url) -> str:
    """Returns host, port and database, or the path of a local socket.

    Raises:
        ValueError: the URL has none of these, or they are invalid.
    """
    if told.scheme == "redis+unix":
        if told.place or not told.path.strip("/"):
            raise ValueError("a local socket is written like redis+unix:///run/redis.sock")
        return told.path
    if not re.fullmatch(r"/?\d*", told.path):
        raise ValueError("behind the host comes the number of a database, such as /0")
    if not told.place and not told.path.strip("/"):
        raise ValueError("it names no server; write it like redis://localhost:6379/0")
    if told.place:
        told.host_and_port(6379)
    return f"{told.place}{told.path}"


def socket_of(connection: Any) -> socket.socket:
    """Returns the socket of a connected redis-py connection.

    Raises:
        StoreError: this version of redis-py gives no access to the socket.
    """
    found = getattr(connection, "_sock", None)
    if not isinstance(found, socket.socket):
        raise StoreError('This version of redis-py is not known: pip install "redis>=6,<9"')
    return found


def advice(error: Exception, secrets: tuple[str, ...] = ()) -> str:
    """Returns one sentence on what to do about an error of the server, without the secrets."""
    # An answer that we read ourselves starts with a code; redis-py turns the code into a class.
    code = _CODES.get(type(error)) or str(error).partition(" ")[0]
    if code in _REMEDIES:
        return _REMEDIES[code]
    if isinstance(error, (TimeoutError, BlockingIOError, redis.exceptions.TimeoutError)):
        return "the server does not answer in time; check it and the network."
    if isinstance(error, (OSError, redis.exceptions.ConnectionError)):
        return f"the server cannot be reached or broke off; start it, or correct the host and port ({shown(error, secrets)})."
    return f"the server said: {shown(error, secrets)}"


_CODES: dict[type[Exception], str] = {
    AuthenticationError: "WRONGPASS",
    redis.exceptions.AuthenticationWrongNumberOfArgsError: "WRONGPASS",
    NoPermissionError: "NOPERM",
    OutOfMemoryError: "OOM",
    ReadOnlyError: "READONLY",
    BusyLoadingError: "LOADING",
    redis.exceptions.MaxConnectionsError: "MANY",
}
_LOGIN = "it wants another user or password; write them as redis://user:password@host:port/0."
_REMEDIES = {
    "NOAUTH": _LOGIN,
    "WRONGPASS": _LOGIN,
    "NOPERM": "this user may not do that; change the user's rights (ACL) or take another one.",
    "OOM": "its memory is full; raise maxmemory, or set maxmemory-policy to allkeys-lru so that old values make room.",
    "READONLY": "it is a replica, which takes no writes; give the address of the primary server.",
    "LOADING": "it is still loading its data; try again later.",
    "MISCONF": "it cannot save to its disk and takes no writes; check its log.",
    "MOVED": "it is part of a cluster, which this store does not know; give a server that stands alone.",
    "MANY": "too many connections are open; raise max_connections in the URL.",
}
"""Remedies by the first word of the server's answer."""
