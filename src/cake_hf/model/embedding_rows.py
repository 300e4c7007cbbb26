"""Whether the rows of a model's token embedding that a prompt uses are what they were when the weights' checksum was made.

An edit of a single row through `.data` or numpy leaves no trace that a cheap look at a weight would see, and it shows only in
prompts with that token. So each prompt's own rows are compared with checksums that are remembered per row.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from cake_hf.chunks.tensor_bytes import odd_factors
from cake_hf.util.forks import Lock

ROWS_AT_ONCE = 2**14

_sums: weakref.WeakKeyDictionary[torch.nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()
_lock = Lock()


def rows_changed(model: torch.nn.Module, ids: torch.Tensor) -> bool:
    """Whether rows of these tokens are others than they were when `remember_rows` was called; False where it was not.

    Args:
        model: of transformers.
        ids: of tokens, any shape.
    """
    with _lock:
        known = _sums.get(model)
    weight = _embedding(model)
    if known is None or weight is None:
        return False
    if known.shape[0] != weight.shape[0] or known.device != weight.device:
        return True
    rows = ids.to(weight.device).unique()
    rows = rows[(rows >= 0) & (rows < weight.shape[0])]
    return not torch.equal(_checksums(weight[rows]), known[rows])


def remember_rows(model: torch.nn.Module) -> None:
    """Make the checksums of all rows, unless they are there."""
    weight = _embedding(model)
    with _lock:
        if weight is None or model in _sums:
            return
        _sums[model] = torch.cat([_checksums(rows) for rows in weight.split(ROWS_AT_ONCE)])


def forget_rows(model: torch.nn.Module) -> None:
    """The weights have changed."""
    with _lock:
        _sums.pop(model, None)


def _embedding(model: Any) -> torch.Tensor | None:
    """`[vocabulary, hidden]`; None where it is not plain, or not in memory."""
    try:
        weight = model.get_input_embeddings().weight.detach()
    except (AttributeError, NotImplementedError):
        return None
    plain = type(weight) is torch.Tensor and weight.layout is torch.strided and weight.device.type != "meta"
    return weight if plain and weight.ndim == 2 and not weight.is_quantized and weight.shape[1] else None


def _checksums(rows: torch.Tensor) -> torch.Tensor:
    """`[rows]` int64: each row's bytes, as words, times fixed odd numbers, modulo 2**64."""
    octets = rows.contiguous().view(torch.uint8).view(rows.shape[0], -1)
    words = torch.nn.functional.pad(octets, (0, -octets.shape[1] % 8)).view(torch.int64)
    return (words * odd_factors(words.shape[1]).to(words.device)).sum(dim=1)
