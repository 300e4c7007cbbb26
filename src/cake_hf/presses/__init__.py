"""Methods of other papers on a restored prompt; see `press`. Not exact, and so never stored.

Import them from here: `from cake_hf.presses import ThinK`.
"""

from cake_hf.presses.cache import PressedCache, PressReport
from cake_hf.presses.layers import PressedLayer, RaggedLayer
from cake_hf.presses.press import Prefix, Press
from cake_hf.presses.think import ThinK

__all__ = ["Prefix", "Press", "PressReport", "PressedCache", "PressedLayer", "RaggedLayer", "ThinK"]
