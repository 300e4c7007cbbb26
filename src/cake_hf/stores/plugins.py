"""Plugins: kinds of stores from installed packages, by URL scheme, as entry points of the group `cake_hf.stores`.

A plugin is imported only when a URL needs it, and entry points are not searched for URLs with one of our own schemes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata

from cake_hf.errors import CakeError, StoreError
from cake_hf.stores.base import Store
from cake_hf.util.redaction import scrub, shown, shown_url

GROUP = "cake_hf.stores"
OURS = metadata.EntryPoint("mooncake", "cake_hf.stores.mooncake:MooncakeStore [mooncake]", GROUP)
"""The entry point that pyproject.toml declares, repeated here for imports from a source tree, which has no metadata."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+")
_PASSWORD = re.compile(r"://[^/@:]*:([^/@]+)@")


@dataclass(frozen=True)
class Plugin:
    """A kind of store from an entry point.

    Attributes:
        points: the entry point; several if several packages claim the scheme.
    """

    points: tuple[metadata.EntryPoint, ...]

    @property
    def example(self) -> str:
        """An example URL of this kind."""
        return f"{self.points[0].name}://..."

    @property
    def install(self) -> str:
        """The command that installs the extras that the entry point needs; empty if it needs none."""
        point, extras = self.points[0], []
        with suppress(AttributeError):  # a malformed entry point
            extras = point.extras
        return f'pip install "{_package(point)}[{",".join(extras)}]"' if extras else ""

    def open(self, url: str) -> Store:
        """Imports the plugin and opens the URL.

        Raises:
            StoreError: the plugin cannot be loaded, does not return a store, or refuses the URL.
        """
        if len(self.points) > 1:
            scheme, packages = self.points[0].name, ", ".join(map(_package, self.points))
            raise StoreError(
                f"Stores at {scheme}:// are brought by several packages ({packages}); uninstall all but one."
            )
        try:
            make = self.points[0].load()
        except (Exception, SystemExit) as error:
            advice = self.install or f"install {_package(self.points[0])} anew, or uninstall it"
            raise StoreError(f"The plugin for {self._name} cannot be loaded ({_reason(error)}): {advice}.") from error
        try:
            store = make(url)
        except CakeError:
            raise
        except (Exception, SystemExit) as error:
            scrub(error, _PASSWORD.findall(url))
            raise StoreError(f"The plugin for {self._name} cannot open {shown_url(url)}: {_reason(error)}.") from error
        if not isinstance(store, Store):
            raise StoreError(f"The plugin for {self._name} has made no Store of {shown_url(url)}, but {_kind(store)}.")
        return store

    @property
    def _name(self) -> str:
        return f"{self.points[0].name}:// of the package {_package(self.points[0])}"


def plugins() -> Mapping[str, Plugin]:
    """Returns the installed plugins by scheme; entry points whose name is not a lower-case scheme are left out."""
    found: dict[str, dict[str, metadata.EntryPoint]] = defaultdict(dict)
    for point in _entry_points():
        if _SCHEME.fullmatch(point.name):
            found[point.name].setdefault(point.value, point)
    return {scheme: Plugin(tuple(points.values())) for scheme, points in found.items()}


def _entry_points() -> Iterator[metadata.EntryPoint]:
    try:
        yield from metadata.entry_points(group=GROUP)
    except Exception:  # one package's metadata is broken: use all others
        yield from _one_by_one(metadata.distributions())
    yield OURS


def _one_by_one(packages: Iterable[metadata.Distribution]) -> Iterator[metadata.EntryPoint]:
    for package in packages:
        with suppress(Exception):
            yield from package.entry_points.select(group=GROUP)


def _package(point: metadata.EntryPoint) -> str:
    return shown(point.dist.name) if point.dist is not None else "cake-hf"


def _reason(error: BaseException) -> str:
    return shown(error).rstrip(".") or type(error).__name__


def _kind(made: object) -> str:
    return "None" if made is None else f"a {type(made).__name__}"
