"""Opens a store from a user's spec: a path, a URL, a list of these, or a store object; and names it for display."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from cake_hf.errors import StoreError
from cake_hf.limits import Limits
from cake_hf.stores.base import Store
from cake_hf.stores.local import LocalStore
from cake_hf.stores.memory import MemoryStore
from cake_hf.stores.plugins import Plugin, plugins
from cake_hf.stores.specs import (
    LOCAL_EXAMPLES,
    Directory,
    bytes_of,
    directory_url,
    kind_of,
    path_directory,
    plain_directory,
)
from cake_hf.stores.tier import Tier
from cake_hf.stores.tiers import open_tiers
from cake_hf.util import environment
from cake_hf.util.redaction import shown, shown_url

StoreSpec = Store | str | os.PathLike[str] | Sequence[Any]
"""A user's spec of a store; a sequence means tiers, nearest first (see `open_tiers`)."""


@dataclass(frozen=True)
class RemoteKind:
    """A kind of store that needs a client library and is imported on first use.

    Attributes:
        example: a URL of this kind.
        opener: "module:name" of the callable that makes the store from its URL.
        extra: extra of this package that installs the client library.
    """

    example: str
    opener: str
    extra: str

    @property
    def install(self) -> str:
        """The command that installs the client library."""
        return f'pip install "cake-hf[{self.extra}]"'

    def open(self, url: str) -> Store:
        """Imports the store's module and opens the URL.

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
    "hf": RemoteKind("hf://org/pack@revision", "cake_hf.stores.hub:open_hub_pack", "hub"),
}
"""Remote kinds by URL scheme. Installed packages may add others, see `plugins`."""

_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(?::|//|$)")
"""Matches the start of a text that may name a kind of store."""


def open_store(spec: StoreSpec | None = None, limits: Limits | None = None) -> Store:
    """Opens a store.

    Args:
        spec: a directory path, `file:///path` or `file:///path?budget=50GB&eviction=front-first`, `memory:` or `memory:4GB`,
            `pack:FOLDER`, the URL of one of `REMOTE_KINDS` or of a plugin; a list of these for tiers, nearest first; or a
            `Store`, which is returned as it is. A `pathlib.Path` is always a directory. If None, the environment variable
            `CAKE_HF_STORE` names a path or a URL.
        limits: limits whose `tier_queue_bytes` and `exit_flush_seconds` apply to tiers; None for the defaults.

    Raises:
        StoreError: the spec names no store (the message says what to write), its client library is not installed, the place
            cannot be a store, or there is no spec.
    """
    if spec is None:
        return _open_default()
    if isinstance(spec, Store):
        return spec
    if isinstance(spec, (list, tuple)):
        return open_tiers(spec, open_store, limits)
    if isinstance(spec, os.PathLike):
        return _open_directory(Directory(path_directory(spec)))
    if not isinstance(spec, str):
        raise StoreError(f"A store is a path, a URL, a Store or a list of these, not {type(spec).__name__}.")
    kind = _kind_of(spec)
    if kind == "memory":
        nbytes = spec.partition(":")[2]
        if "?" in nbytes:
            raise StoreError("Memory has a size and no options; write it like memory:4GB.")
        return MemoryStore(bytes_of(nbytes)) if nbytes else MemoryStore()
    if kind == "pack":
        return _PACK.open(str(pack_folder(spec)))
    if kind in ("", "file"):
        return _open_directory(_directory(spec, kind))
    return _kinds(spec)[kind].open(spec)


def directory_of(spec: str) -> Path | None:
    """Returns the directory that a path or a `file://` URL names; None for other stores. Does not access the file system.

    Raises:
        StoreError: the spec names no store.
    """
    kind = _kind_of(spec)
    return _directory(spec, kind).path if kind in ("", "file") else None


def pack_folder(spec: str) -> Path:
    """Returns the folder that `pack:FOLDER`, or a path, names.

    Raises:
        StoreError: the spec names another kind of store, or none.
    """
    kind = _kind_of(spec)
    folder = spec.partition(":")[2] if kind == "pack" else spec
    if not folder or kind not in ("pack", "") or _kind_of(folder):
        raise StoreError(f"'{shown_url(spec)}' names no pack's folder; write it like pack:/data/pack.")
    return plain_directory(folder)


def _kind_of(spec: str) -> str:
    kinds = _kinds(spec)
    return kind_of(spec, {scheme: kind.example for scheme, kind in kinds.items()}, _known(kinds.values()))


def _kinds(spec: str) -> Mapping[str, RemoteKind | Plugin]:
    """Returns the remote kinds by scheme. Plugins are searched only if the text may name one, since that is slow."""
    named = _NAMED.match(spec)
    if named is None or named[1] in REMOTE_KINDS or named[1] in LOCAL_EXAMPLES:
        return REMOTE_KINDS
    others = {scheme: kind for scheme, kind in plugins().items() if scheme not in {**REMOTE_KINDS, **LOCAL_EXAMPLES}}
    return {**REMOTE_KINDS, **others}


def _directory(spec: str, kind: str) -> Directory:
    return directory_url(spec) if kind == "file" else Directory(plain_directory(spec))


def _open_directory(told: Directory) -> LocalStore:
    try:
        return LocalStore(told.path, told.budget, told.eviction)
    except ValueError as error:
        raise StoreError(str(error)) from error


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


def _known(kinds: Iterable[RemoteKind | Plugin]) -> str:
    """Returns a list, for messages, of the kinds that can be opened and how to install their client libraries."""
    by_extra: dict[str, list[str]] = {}
    for kind in (*kinds, _PACK):
        by_extra.setdefault(kind.install, []).append(kind.example)
    remote = [f"{', '.join(examples)}{f' ({install})' * bool(install)}" for install, examples in by_extra.items()]
    return "; ".join([f"a directory path, {LOCAL_EXAMPLES['file']}, {LOCAL_EXAMPLES['memory']}", *remote])


def store_name(spec: object) -> str:
    """Returns the display name of a store's spec, without asking the store; for a directory, the last part of its path.

    It has no secrets and no full paths: reports are shown to people who need not know where on a machine a directory is.
    """
    if spec is None:
        spec = environment.text_from(environment.STORE) or ""
    if isinstance(spec, (list, tuple)):
        return ", ".join(map(store_name, spec))
    if isinstance(spec, Tier):
        return store_name(spec.store)
    if isinstance(spec, LocalStore):
        return _last_part(spec.root)
    if isinstance(spec, Store):
        return _name_of_store(spec)
    return _last_part(Path(spec)) if isinstance(spec, os.PathLike) else _name_of_text(str(spec))


def _name_of_text(text: str) -> str:
    try:
        path = directory_of(text)
    except StoreError:  # opening the store reports what is wrong
        path = None
    if path is None and text.startswith("pack:"):
        return f"pack:{_last_part(Path(text.removeprefix('pack:')))}"
    return shown_url(text) if path is None else _last_part(path)


def _name_of_store(store: Store) -> str:
    """Returns the kind of a store object, with its place if that is on a network."""
    # The repr of a user's own store may do anything, so only ours is called.
    tells = type(store).__module__.startswith("cake_hf.") and type(store).__repr__ is not object.__repr__
    told = shown(repr(store)) if tells else ""
    return told if "://" in told else type(store).__name__


def _last_part(path: Path) -> str:
    return shown(path.name or path)
