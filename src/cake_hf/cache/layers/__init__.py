"""Our cache layers, one file per kind of what a layer keeps."""

from cake_hf.cache.layers.indexed import IndexedLayer
from cake_hf.cache.layers.kinds import ours_for
from cake_hf.cache.layers.recurrent import HybridLayer, RecurrentLayer
from cake_hf.cache.layers.token_major import HEADROOM_TOKENS, TokenMajorLayer
from cake_hf.cache.layers.windowed import WindowedLayer

__all__ = [
    "HEADROOM_TOKENS",
    "HybridLayer",
    "IndexedLayer",
    "RecurrentLayer",
    "TokenMajorLayer",
    "WindowedLayer",
    "ours_for",
]
