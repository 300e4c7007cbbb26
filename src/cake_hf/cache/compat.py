"""What differs between the versions of transformers that are supported: the only place that knows.

The oldest is 5.17. Before it, models with an indexer attend to the wrong tokens in every forward that goes on from others.
"""

from __future__ import annotations

from typing import Any

from transformers import cache_utils


class _Absent:
    """In place of a class that this version has not: nothing is one."""


DummyLayer: Any = getattr(cache_utils, "DummyLayer", _Absent)
"""Of layers that keep nothing. Where it is absent, a cache has no layer for these, or a recurrent one that stays empty."""


def drop_content(layer: Any) -> None:
    """Begin the `reset` of a layer that keeps tokens. Older versions would fill its tensors, which others may hold, with zeros.

    They would also go on behind these zeros.
    """
    layer.keys = layer.values = None
    layer.is_initialized = False
