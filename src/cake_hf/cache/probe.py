"""What KV a model makes: found out by running one token, once per model and mode.

No config says for all model families how many heads of which size are kept, and a wrong guess would be a lost restore.
"""

from __future__ import annotations

import threading
import weakref

import torch
from transformers import DynamicCache

from cake_hf.tensors.fingerprint import autocast_facts

KvLike = list[tuple[torch.Tensor, torch.Tensor]]

_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[object, KvLike]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def kv_like(model: torch.nn.Module) -> KvLike:
    """For each layer a K and a V of one token, `[1, heads, 1, head_dim]`, as the model makes them at present.

    Args:
        model: whose layers all keep full attention.
    """
    present = next(model.parameters())
    mode = (present.dtype, present.device, autocast_facts(present.device.type))
    with _lock:
        known = _known.setdefault(model, {})
        if mode not in known:
            known[mode] = _run_one_token(model, present.device)
        return known[mode]


def _run_one_token(model: torch.nn.Module, device: torch.device) -> KvLike:
    cache = DynamicCache(config=model.config)
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]
