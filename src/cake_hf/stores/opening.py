"""From what a user writes to a store: a path, a URL, or a store object as it is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

from cake_hf.arithmetic import environment
from cake_hf.arithmetic.errors import StoreError
from cake_hf.arithmetic.limits import Limits
from cake_hf.arithmetic.sizes import parse_bytes
from cake_hf.stores.base import Store
from cake_hf.stores.eviction import LRU
from cake_hf.stores.local import LocalStore
from cake_hf.stores.memory import MemoryStore
from cake_hf.stores.tiers import open_tiers

StoreSpec = Store | str | os.PathLike[str] | Sequence[Any]
"""What a user writes; a sequence is tiers, nearest first (see `open_tiers`)."""


@dataclass(frozen=True)
class RemoteKind:
    """A kind of store that needs a client library, and is imported when it is first asked for.

    Attributes:
        example: a URL of this kind.
        opener: "module:name" of what makes the store from its URL.
        extra: of this package, with the client library in it.
    """

    example: str
    opener: str
    extra: str

    @property
    def install(self) -> str:
        """The command that brings the client library."""
        return f'pip install "cake-hf[{self.extra}]"'

    def open(self, url: str) -> Store:
        """Import the store's module and open the URL.

        Raises:
            StoreError: the client library is not installed, or the store refuses the URL.
        """
        module, name = self.opener.split(":")
        try:
            make = cast(Callable[[str], Store], getattr(import_module(module), name))
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "cake_hf":
                raise
            scheme = url.partition(":")[0]
            raise StoreError(f"Stores at {scheme}:// need the package {error.name}: {self.install}") from error
        return make(url)


_OBJECT = "cake_hf.stores.object:ObjectStore"
_REDIS = "cake_hf.stores.redis:RedisStore"
_PACK = RemoteKind("pack:folder", "cake_hf.stores.pack:open_folder_pack", "hub")

REMOTE_KINDS = {
    "s3": RemoteKind("s3://bucket/prefix", _OBJECT, "object"),
    "gs": RemoteKind("gs://bucket/prefix", _OBJECT, "object"),
    "az": RemoteKind("az://container/prefix", _OBJECT, "object"),
    "redis": RemoteKind("redis://host:6379/0", _REDIS, "redis"),
    "rediss": RemoteKind("rediss://host:6379/0", _REDIS, "redis"),
    "redis+unix": RemoteKind("redis+unix:///path/to.sock", _REDIS, "redis"),
    "mooncake": RemoteKind("mooncake://master:50051/prefix", "cake_hf.stores.mooncake:MooncakeStore", "mooncake"),
    "hf": RemoteKind("hf://org/pack@revision", "cake_hf.stores.hub:open_hub_pack", "hub"),
}
"""By URL scheme. A new kind of store is one line here and one file beside this one."""


def open_store(spec: StoreSpec | None = None, limits: Limits | None = None) -> Store:
    """Open a store.

    Args:
        spec: a directory path, `file:///path` or `file:///path?budget=50GB&eviction=front-first`, `memory:` or `memory:4GB`,
            `pack:FOLDER`, the URL of one of `REMOTE_KINDS`; a list of these for tiers, nearest first; or a `Store`, which is
            returned as it is. Without it, the environment variable `CAKE_HF_STORE` names a path or a URL.
        limits: of tiers, for their `tier_queue_bytes` and `exit_flush_seconds`; the defaults where it is None.

    Raises:
        StoreError: an unknown URL scheme, a client library that is not installed, a place that cannot be a store, or nothing is
            named.
    """
    if spec is None:
        return _open_default()
    if isinstance(spec, Store):
        return spec
    if isinstance(spec, (list, tuple)):
        return open_tiers(spec, open_store, limits)
    if not isinstance(spec, (str, os.PathLike)):
        raise StoreError(f"A store is a path, a URL, a Store or a list of these, not {type(spec).__name__}.")
    text = os.fspath(spec)
    if text in ("", "file://"):
        raise StoreError("The store path is empty; give a directory, such as ~/.cache/cake_hf.")
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "memory":
        return MemoryStore(_bytes(rest)) if rest else MemoryStore()
    if colon and scheme == "pack":
        return _PACK.open(rest)
    if colon and rest.startswith("//"):
        if scheme == "file":
            return _open_directory(rest.removeprefix("//"))
        if scheme in REMOTE_KINDS:
            return REMOTE_KINDS[scheme].open(text)
        shown = re.sub("//[^/]*@", "//", text)  # a password is nobody's business
        raise StoreError(f"Unknown store URL {shown!r}; known are {_known()}.")
    return LocalStore(text)


def directory_of(spec: str) -> Path | None:
    """The directory that a path or a `file://` URL names; None for what is no directory. Nothing is looked at."""
    scheme, colon, rest = spec.partition(":")
    if colon and scheme == "file" and rest.startswith("//"):
        return Path(rest.removeprefix("//").partition("?")[0]).expanduser()
    other = colon and (scheme in ("memory", "pack") or rest.startswith("//"))
    return None if other else Path(spec).expanduser()


def _open_default() -> Store:
    text = environment.text_from(environment.STORE)
    if text is None:
        raise StoreError(
            f"No store is named: pass one, such as store='~/.cache/cake_hf', or set the variable {environment.STORE} to one."
        )
    try:
        return open_store(text)
    except StoreError as error:
        raise StoreError(f"{environment.STORE} cannot be used: {error}") from error


def _open_directory(text: str) -> LocalStore:
    path, _, query = text.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    budget, eviction = options.pop("budget", None), options.pop("eviction", LRU)
    if options:
        raise StoreError(f"A directory has no option {next(iter(options))!r}; known are budget and eviction.")
    try:
        return LocalStore(path, None if budget is None else parse_bytes(budget), eviction)
    except ValueError as error:
        raise StoreError(str(error)) from error


def _known() -> str:
    """What can be opened, and what to install for it."""
    by_extra: dict[str, list[str]] = {}
    for kind in (*REMOTE_KINDS.values(), _PACK):
        by_extra.setdefault(kind.install, []).append(kind.example)
    remote = [f"{', '.join(examples)} ({install})" for install, examples in by_extra.items()]
    return "; ".join(["a directory path, file:///path, memory:4GB", *remote])


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise StoreError(str(error)) from error
