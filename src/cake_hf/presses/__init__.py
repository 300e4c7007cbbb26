"""Methods of other papers on a restored prompt; see `press`. Not exact, and so never stored.

Import them from here: `from cake_hf.presses import ThinK`.
"""

from cake_hf.presses.attention import Attention
from cake_hf.presses.cache import PressedCache, PressReport
from cake_hf.presses.corm import CORM
from cake_hf.presses.dbudgetkv import DBudgetKV
from cake_hf.presses.from_kvpress import FromKvpress
from cake_hf.presses.kvmerger import KVMerger
from cake_hf.presses.layers import PressedLayer, RaggedLayer
from cake_hf.presses.less import LESS, Kernels, load_kernels, save_kernels
from cake_hf.presses.press import Prefix, Press
from cake_hf.presses.think import ThinK
from cake_hf.presses.window import Recorded

__all__ = [
    "CORM",
    "LESS",
    "Attention",
    "DBudgetKV",
    "FromKvpress",
    "KVMerger",
    "Kernels",
    "Prefix",
    "Press",
    "PressReport",
    "PressedCache",
    "PressedLayer",
    "RaggedLayer",
    "Recorded",
    "ThinK",
    "load_kernels",
    "save_kernels",
]
