"""The methods that are compared, by the name that stands in tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from cake_hf.presses import (
    CORM,
    EPIC,
    LESS,
    Blend,
    CacheBlend,
    CascadingKV,
    ClusterKV,
    DBudgetKV,
    ElasticCache,
    KVMerger,
    KVSharer,
    Press,
    ThinK,
    load_kernels,
)

FULL = "full KV"


T = TypeVar("T")

Method = Press | Blend | None
"""What makes the cache that is asked; None is the full KV."""


def contestants(kernels: Path | None = None, shared: Path | None = None) -> Mapping[str, Method]:
    """Returns all methods in the order of the table.

    Args:
        kernels: what `training/train_less.py` made for the model; None leaves LESS out.
        shared: what `training/share_layers.py` found for the model; None leaves KVSharer out.
    """
    found: dict[str, Method] = {
        FULL: None,
        "ThinK, 50 % of channels": ThinK(0.5),
        "ThinK, 75 %": ThinK(0.75),
        "CORM, window 64": CORM(window=64),
        "CORM, window 16": CORM(window=16),
        "DBudgetKV, 1 %": DBudgetKV(0.01),
        "DBudgetKV, 5 %": DBudgetKV(0.05),
        "KVMerger, keeps 50 %": KVMerger(0.5),
        "KVMerger, keeps 25 %": KVMerger(0.25),
        "ElasticCache, keeps 50 %": ElasticCache(0.5),
        "ElasticCache, keeps 25 %": ElasticCache(0.75),
        "CascadingKV, keeps 50 %": CascadingKV(0.5),
        "CascadingKV, keeps 25 %": CascadingKV(0.75),
        "ClusterKV, reads 50 %": ClusterKV(0.5),
        "ClusterKV, reads 25 %": ClusterKV(0.75),
        "eviction alone, keeps 50 %": LESS([], 0.5),
        "eviction alone, keeps 25 %": LESS([], 0.25),
        "eviction alone, keeps 10 %": LESS([], 0.1),
    }
    if kernels is not None:
        trained = load_kernels(kernels)
        found |= {f"LESS, keeps {100 * keep:.0f} %": LESS(trained, keep) for keep in (0.25, 0.1)}
    if shared is not None:
        pairs = json.loads(shared.read_text(encoding="utf-8"))
        found |= {f"KVSharer, {len(one)} layers share": KVSharer(tuple(map(tuple, one))) for one in pairs.values()}
    return found | {
        "documents alone, none again": EPIC(0),
        "EPIC, 16 tokens again": EPIC(16),
        "CacheBlend, 15 % again": CacheBlend(0.15),
        "CacheBlend, 50 % again": CacheBlend(0.5),
    }


def chosen(methods: Mapping[str, T], names: Sequence[str]) -> Mapping[str, T]:
    """Returns the methods of these names, in the order of the table; without names all.

    Raises:
        ValueError: there is no method of a name.
    """
    if unknown := sorted(set(names) - set(methods)):
        raise ValueError(f"There is no method {unknown[0]!r}; choose from {'; '.join(methods)}.")
    return {name: one for name, one in methods.items() if not names or name in names}
