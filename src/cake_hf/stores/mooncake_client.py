"""This process's membership in a Mooncake cluster: joined once, shared by all stores with equal settings, left safely.

The client is native code. It returns numeric codes, aborts the process if it is used after it was closed or if the interpreter
ends during a call, and takes 90 seconds to notice that there is no master. This file hides all of that.
"""

from __future__ import annotations

import atexit
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from cake_hf.errors import StoreError
from cake_hf.util.forks import FinalizerLock, renewed_in_child
from cake_hf.util.redaction import shown, shown_url
from cake_hf.util.sizes import parse_bytes
from cake_hf.util.urls import split_url

PROTOCOLS = ("tcp", "rdma")

CONNECT_SECONDS = 5.0
"""How long the master may take to accept a connection."""

EXIT_SECONDS = 35.0
"""How long leaving the interpreter waits for running calls. The client itself gives up a transfer after 30 seconds."""

NO_ROOM = -200
REFUSED = -600
NOT_READY = -703
NOT_FOUND = -704
LEASED = -706
LEASE_EXPIRED = -707

_REASONS = {
    NO_ROOM: "the cluster has no room: no process lends it memory, or all of it is in use; lend some (?lend=4GB in the URL)",
    REFUSED: "the client refuses the call",
    LEASED: "it is being read; try again later",
    LEASE_EXPIRED: "reading took longer than the master's lease; raise its --default_kv_lease_ttl",
    -800: "the transfer failed: the process that lends the memory is gone or cannot be reached",
    -900: "the master does not answer; check that mooncake_master is running",
    -901: "the master did not answer in time",
}


@dataclass(frozen=True)
class MooncakeSettings:
    """The settings of a membership; see `MooncakeStore` for their meaning."""

    master: str
    host: str
    lend_bytes: int
    protocol: str
    devices: str
    metadata: str = field(repr=False)  # a URL, which may contain a password


@dataclass(frozen=True)
class MooncakeAddress:
    """A parsed `mooncake://` URL.

    Attributes:
        place: the URL without its options, for messages.
        prefix: prefix of the names in the cluster.
        replicas: number of lending processes that keep each value.
        listing: URL at which the master lists its keys.
        settings: settings of the membership.
    """

    place: str
    prefix: str
    replicas: int
    listing: str
    settings: MooncakeSettings

    @classmethod
    def parse(cls, url: str) -> MooncakeAddress:
        """Parses a URL.

        Raises:
            StoreError: the URL or one of its options is invalid.
        """
        options = {
            "lend": "",
            "replicas": "1",
            "protocol": "tcp",
            "devices": "",
            "metadata": "P2PHANDSHAKE",
            "host": "",
            "admin": "9003",
        }
        try:
            told = split_url(url)
            if told.login:
                raise ValueError("Mooncake knows no users and passwords")
            host, port = told.host_and_port(50051)
            if unknown := sorted(set(told.options) - set(options)):
                raise ValueError(f"unknown option {unknown[0]!r}; known are {', '.join(options)}")
            options |= told.options
            prefix = told.path.strip("/") or "cake_hf"
            if not re.fullmatch(r"[\w./-]+", prefix):
                raise ValueError("it needs a prefix of letters, digits and . _ / -")
            if options["protocol"] not in PROTOCOLS:
                raise ValueError(f"the protocol must be one of {', '.join(PROTOCOLS)}")
            lend = parse_bytes(options["lend"]) if options["lend"] else 0
            replicas, admin = int(options["replicas"]), int(options["admin"])
            if replicas < 1 or not 0 < admin < 2**16:
                raise ValueError("there must be at least one replica, and admin is a port")
        except ValueError as error:
            said = str(error).removesuffix(".")
            whole = f"'{shown_url(url)}'" if "@" not in url else "The URL"
            raise StoreError(f"{whole} is not mooncake://master:50051/prefix with its options: {said}.") from None
        host = host.lower()
        master = f"{host}:{port}"
        return cls(
            place=f"mooncake://{master}/{prefix}",
            prefix=prefix,
            replicas=replicas,
            listing=f"http://{host}:{admin}/get_all_keys",
            settings=MooncakeSettings(
                master, options["host"], lend, options["protocol"], options["devices"], options["metadata"]
            ),
        )


class Member:
    """A client of the cluster, with the number of stores that use it. Get it from `join`, give it back with `leave`.

    Args:
        settings: settings of the client, which is created at the first call.
    """

    def __init__(self, settings: MooncakeSettings) -> None:
        self.settings = settings
        self._client: Any = None
        self._left = False
        self.stores = 0
        self._renew()
        renewed_in_child(self._renew)

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Yields the native client, which lives at least as long as the body.

        Raises:
            StoreError: the cluster cannot be joined, or the last store was closed.
        """
        with self._changed:
            if self._left:
                raise StoreError("The Mooncake store is closed; open it again.")
            if self._client is None:
                self._client = _new_client(self.settings)
            self._calls += 1
        try:
            yield self._client
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()
                self._end_if_idle()

    def retire(self, seconds: float = 0.0) -> None:
        """Accepts no more calls; waits up to `seconds` for running ones. The client is closed after the last call."""
        with self._changed:
            self._left = True
            self._changed.wait_for(lambda: not self._calls, seconds)
            self._end_if_idle()

    def _renew(self) -> None:
        """Initializes the count of calls; also in a forked child, which has no calls of other threads."""
        self._changed, self._calls = threading.Condition(), 0

    def _end_if_idle(self) -> None:
        if self._left and not self._calls and self._client is not None:
            client, self._client = self._client, None
            client.close()


_members: dict[MooncakeSettings, Member] = {}
_turns = FinalizerLock()


def join(settings: MooncakeSettings) -> Member:
    """Returns the process's membership with these settings; does not contact the cluster yet."""
    with _turns:
        member = _members.setdefault(settings, Member(settings))
        member.stores += 1
        return member


def leave(member: Member) -> None:
    """Gives back a store's membership; the last store's call ends it. Finalizers may call it."""
    _turns.soon(partial(_leave, member))


def _leave(member: Member) -> None:
    member.stores -= 1
    if not member.stores:
        _members.pop(member.settings, None)
        member.retire()


@atexit.register
def _leave_all() -> None:
    """Leaves all clusters before the process ends, so that no other process waits for it and no call is still running."""
    deadline = time.monotonic() + EXIT_SECONDS
    for member in list(_members.values()):
        member.retire(max(0.0, deadline - time.monotonic()))


def check(code: int, what: str) -> int:
    """Returns a code from the client, unless it is an error.

    Raises:
        StoreError: the code is an error; `what` is the start of the message.
    """
    if code < 0:
        raise StoreError(f"{what}: {_REASONS.get(code, f'Mooncake reports error {code}')}.")
    return code


def native_client() -> Any:
    """Returns the client's module.

    Raises:
        StoreError: the package or a library is missing.
    """
    try:
        return import_module("mooncake.store")
    except ModuleNotFoundError as error:
        raise StoreError(
            f'Stores at mooncake:// need the package {error.name}: pip install "cake-hf[mooncake]"'
        ) from error
    except ImportError as error:
        raise StoreError(
            f"The Mooncake client cannot be loaded: {shown(error)} (Debian: apt-get install libibverbs1)."
        ) from error


def _new_client(settings: MooncakeSettings) -> Any:
    """Joins the cluster.

    Raises:
        StoreError: the master cannot be reached.
    """
    client, own_address = native_client().MooncakeDistributedStore(), _own_address(settings.master)
    code = client.setup(
        settings.host or own_address,
        settings.metadata,
        settings.lend_bytes,
        0,
        settings.protocol,
        settings.devices,
        settings.master,
    )
    if code:
        raise StoreError(
            f"The Mooncake cluster at {settings.master} cannot be joined (error {code}); check protocol and devices in the "
            "URL, and what the client wrote to stderr."
        )
    return client


def _own_address(master: str) -> str:
    """Returns this machine's address as seen on the way to the master; the client itself takes minutes to fail."""
    host, _, port = master.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise StoreError(
            f"The Mooncake master at {master} cannot be reached ({shown(error)}); check the address and that it is running."
        ) from error
