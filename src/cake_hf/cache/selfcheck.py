"""On a transformers that is newer than any this library was tested with: does a restored prompt still give what it should?

One short prompt is computed in chunks on a `DynamicCache`, computed by us, and restored by us from a store in memory. All
three have to give the same logits, bit for bit, and so has the token after it. It is done once per model, when the first cache
is made for it, and takes the time of some 200 tokens. A model that fails gets transformers' own layers, and plain compute.
"""

from __future__ import annotations

import logging
import threading
import weakref
from contextlib import closing
from typing import Any

import torch
import transformers

from cake_hf.arithmetic.frontier import Strategy
from cake_hf.arithmetic.limits import MIN_CHUNK_SIZE, Limits
from cake_hf.cache.compat import NEWEST_TESTED, is_untested, named_for, parameters_of
from cake_hf.cache.restore import no_progress
from cake_hf.cache.restoring import RestoringCache
from cake_hf.cache.session import Session
from cake_hf.cache.support import layers_and_reason, layers_for, plain_cache, plain_layers
from cake_hf.stores.memory import MemoryStore
from cake_hf.tensors.offload import home_device

logger = logging.getLogger("cake_hf")

CHUNK = MIN_CHUNK_SIZE
TOKENS = 3 * CHUNK + 5
FLUSH_SECONDS = 60.0

_verdicts: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def checked_layers(model: torch.nn.Module) -> tuple[list[Any], str]:
    """`layers_and_reason`, and on an untested version of transformers the verdict of a restored prompt."""
    layers, reason = layers_and_reason(model)
    if reason or not is_untested():
        return layers, reason
    reason = _verdict(model)
    return (plain_layers(model) if reason else layers), reason


def _verdict(model: torch.nn.Module) -> str:
    """Why prompts of this model are computed plainly on the installed transformers; empty if they can be restored."""
    if model.training:  # dropout: no two runs are alike
        return (
            "the model was in training mode when its cache was made, so this version of transformers could not be tried"
        )
    with _lock:
        if model not in _verdicts:
            _verdicts[model] = _try_out(model)
        return _verdicts[model]


def _try_out(model: torch.nn.Module) -> str:
    installed = transformers.__version__
    try:
        wrong = _examine(model)
    except Exception as error:  # whatever it is that has changed
        wrong = f"{type(error).__name__}: {error}"
    if not wrong:
        logger.warning(
            "transformers %s is newer than %s, the newest that was tested; a short prompt was restored correctly.",
            installed,
            NEWEST_TESTED,
        )
        return ""
    reason = (
        f"transformers {installed} is newer than {NEWEST_TESTED}, the newest that was tested, and a short prompt could not be "
        f"restored ({wrong}); update cake_hf, or install transformers<={NEWEST_TESTED}"
    )
    logger.warning("%s. Prompts are computed plainly.", reason)
    return reason


@torch.no_grad()
def _examine(model: Any) -> str:
    """What differs from chunks on a `DynamicCache`; empty if nothing does."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(TOKENS, device=home_device(model)) * 7 % min(vocabulary, 61)).unsqueeze(0)
    expected = _in_chunks(model, ids)
    store = MemoryStore()
    for strategy in (Strategy.COMPUTE, Strategy.LOAD):
        if not torch.equal(_by_us(model, ids, store, strategy), expected):
            return f"other logits, strategy {strategy.value!r}"
    return ""


def _in_chunks(model: Any, ids: torch.Tensor) -> torch.Tensor:
    cache = plain_cache(model)
    for start in range(0, TOKENS, CHUNK):
        logits = _last_logits(model, cache, ids[:, start : start + CHUNK])
    return torch.cat([logits, _next_logits(model, cache, ids)])


def _by_us(model: Any, ids: torch.Tensor, store: MemoryStore, strategy: Strategy) -> torch.Tensor:
    session = Session(
        model,
        store,
        chunk_size=CHUNK,
        salt="",
        save=True,
        exact=True,
        strategy=strategy,
        limits=Limits.from_environment(),
    )
    with closing(session):
        cache = RestoringCache(session, layers_for(model), "")
        new = ids
        if "logits_to_keep" not in parameters_of(model.forward):
            cache._prefill(ids, 1, no_progress)
            new = ids[:, cache.get_seq_length() :]
        logits = torch.cat([_last_logits(model, cache, new), _next_logits(model, cache, ids)])
        session.flush(FLUSH_SECONDS)
    return logits


def _next_logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return _last_logits(model, cache, ids[:, :1])


def _last_logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": True, **named_for(model.forward, cache)}
    if "logits_to_keep" in parameters_of(model.forward):
        arguments["logits_to_keep"] = 1
    logits: torch.Tensor = model(**arguments)[0][:, -1]  # by place: fields are renamed now and then
    return logits
