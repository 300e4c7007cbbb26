"""The canonical text of metadata, from which digests are computed."""

from __future__ import annotations

import json
from typing import Any


def canonical(facts: Any) -> str:
    """Returns metadata as text, the same for equal metadata."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
