"""The package's own cache layers, one file per kind of content."""

from cake_hf.layers.indexed import IndexedLayer
from cake_hf.layers.kinds import ours_for
from cake_hf.layers.recurrent import HybridLayer, RecurrentLayer
from cake_hf.layers.sliding_window import SlidingWindowLayer
from cake_hf.layers.token_major import HEADROOM_TOKENS, TokenMajorLayer

__all__ = [
    "HEADROOM_TOKENS",
    "HybridLayer",
    "IndexedLayer",
    "RecurrentLayer",
    "SlidingWindowLayer",
    "TokenMajorLayer",
    "ours_for",
]
