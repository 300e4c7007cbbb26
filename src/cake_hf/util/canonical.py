"""One text for equal metadata, which digests are made of."""

from __future__ import annotations

import json
from typing import Any


def canonical(facts: Any) -> str:
    """Facts as text, the same for equal facts."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
