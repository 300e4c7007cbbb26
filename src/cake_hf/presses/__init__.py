"""Methods of other papers on a restored prompt; see `press`. Not exact, and so never stored.

Import them from here: `from cake_hf.presses import ThinK`.
"""

from cake_hf.presses.attention import Attention, AttentionCall
from cake_hf.presses.blend import Blend, BlendReport
from cake_hf.presses.cache import PressedCache, PressReport
from cake_hf.presses.cacheblend import CacheBlend
from cake_hf.presses.cascading import CascadingKV
from cake_hf.presses.clusterkv import ClusterKV
from cake_hf.presses.corm import CORM
from cake_hf.presses.dbudgetkv import DBudgetKV
from cake_hf.presses.elastic import ElasticCache
from cake_hf.presses.epic import EPIC
from cake_hf.presses.from_kvpress import FromKvpress
from cake_hf.presses.kvmerger import KVMerger
from cake_hf.presses.kvsharer import KVSharer
from cake_hf.presses.layers import PressedLayer, RaggedLayer
from cake_hf.presses.less import LESS, Kernels, load_kernels, save_kernels
from cake_hf.presses.press import Prefix, Press
from cake_hf.presses.think import ThinK
from cake_hf.presses.vlcache import VLCache
from cake_hf.presses.window import Recorded

__all__ = [
    "CORM",
    "EPIC",
    "LESS",
    "Attention",
    "AttentionCall",
    "Blend",
    "BlendReport",
    "CacheBlend",
    "CascadingKV",
    "ClusterKV",
    "DBudgetKV",
    "ElasticCache",
    "FromKvpress",
    "KVMerger",
    "KVSharer",
    "Kernels",
    "Prefix",
    "Press",
    "PressReport",
    "PressedCache",
    "PressedLayer",
    "RaggedLayer",
    "Recorded",
    "ThinK",
    "VLCache",
    "load_kernels",
    "save_kernels",
]
