"""Stores that a test hands to commands: a plugin opens them, by a URL. PYTEST_DONT_REWRITE

A test module that wants them says `pytest_plugins = ["lent"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest

from cake_hf import Store

Lend = Callable[[Callable[[], Store]], str]

_made: dict[str, Callable[[], Store]] = {}
_numbers = count()


def open_lent(url: str) -> Store:
    """What the plugin's entry point names."""
    return _made[url]()


@pytest.fixture
def lend(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lend]:
    """Gives a URL for what makes a store each time that it is opened."""
    told = tmp_path_factory.mktemp("lent") / "lent-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: lent\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text("[cake_hf.stores]\nlent = lent:open_lent\n")
    monkeypatch.syspath_prepend(told.parent)
    urls: list[str] = []

    def new(make: Callable[[], Store]) -> str:
        urls.append(f"lent://{next(_numbers)}")
        _made[urls[-1]] = make
        return urls[-1]

    yield new
    for url in urls:
        del _made[url]
