"""Old import paths that the documentation and the examples once used."""

import sys
from importlib import import_module

_HOMES = {
    "haystack": "testing.haystack",
    "models": "cli.models",
    "packs": "packs",
    "packs.importing": "packs.importing",
    "packs.publish": "packs.publish",
    "plots": "plots",
}

__path__: list[str] = []  # makes this a package; its modules are registered below
for _old, _new in _HOMES.items():
    sys.modules[f"{__name__}.{_old}"] = import_module(f"cake_hf.{_new}")
