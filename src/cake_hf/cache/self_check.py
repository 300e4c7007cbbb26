"""Checks, on a transformers newer than any tested version, that a restored prompt still gives the right result.

One short prompt is computed in chunks on a `DynamicCache`, computed by us, and restored by us from a store in memory. All three
must give the same logits, bit for bit, both for the prompt and for the token after it. The check runs once per model, when the
first cache is made for it, and takes as long as some 200 tokens and the checksum of the weights. A model that fails gets
transformers' own layers, and plain compute.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch

from cake_hf.cache.restoring import RestoringCache
from cake_hf.layers import compat
from cake_hf.layers.compat import forward_parameters, named_for, plain_cache
from cake_hf.limits import MIN_CHUNK_SIZE, Limits
from cake_hf.model.foreign_code import Presses
from cake_hf.model.look import home_device
from cake_hf.model.ranks import ranks_of
from cake_hf.report import Refusal, Report
from cake_hf.restore.forwards import no_progress
from cake_hf.restore.session import Session
from cake_hf.restore.support import layers_for, layers_or_refusal, tell_once
from cake_hf.scheduling.frontier import Strategy
from cake_hf.stores.memory import MemoryStore
from cake_hf.util.forks import Lock
from cake_hf.util.interrupts import is_the_users

CHUNK = MIN_CHUNK_SIZE
CHUNKS = 3
TOKENS = CHUNKS * CHUNK + 5
FLUSH_SECONDS = 60.0


@dataclass
class _Verdict:
    """The result of the check for one model. The lock is held during the check.

    Attributes:
        checked: whether there is a result.
        refusal: the result: why prompts are computed plainly, or None.
    """

    checked: bool = False
    refusal: Refusal | None = None
    lock: threading.RLock = field(default_factory=Lock)


class _Trial(RestoringCache):
    """A cache without fallbacks: an error in it is a finding of the check."""

    def _handle_if_understood(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], past: int
    ) -> Any:
        return self._handle(model, args, kwargs, past)

    def _learn_from(self, error: BaseException | None) -> None:
        pass


class _Undecided(Exception):
    """The model is computed plainly at present, for a reason unrelated to the version of transformers."""


_verdicts: weakref.WeakKeyDictionary[torch.nn.Module, _Verdict] = weakref.WeakKeyDictionary()
_lock = Lock()


def checked_layers(model: torch.nn.Module) -> tuple[list[Any], Refusal | None]:
    """Returns the layers for a cache, and why the model's prompts are computed plainly (None if they are not).

    On an untested version of transformers, the verdict of a restored prompt decides. No layers mean that the model, or the
    version, is not understood: the cache must then be a passive one.
    """
    layers, refusal = layers_or_refusal(model)
    if refusal or not compat.is_untested():
        return layers, refusal
    refusal = _verdict(model)
    return ([] if refusal else layers), refusal


def _verdict(model: torch.nn.Module) -> Refusal | None:
    """Returns why prompts of this model are computed plainly on the installed transformers; None if they can be restored."""
    if model.training:  # dropout: no two runs are alike
        return Refusal(
            "untried-in-training",
            "the model was in training mode when its cache was made, so this version of transformers could not be tried",
        )
    if ranks_of(model) is not None:  # each rank would come to a verdict of its own
        return Refusal(
            "untried-on-ranks",
            "a tensor-parallel model is not tried on a version of transformers that is newer than the newest tested",
        )
    with _lock:
        verdict = _verdicts.setdefault(model, _Verdict())
    with verdict.lock:
        if not verdict.checked:
            try:
                verdict.refusal = _try_out(model)
            except _Undecided:
                return None  # the prompt's own report will say why it is computed
            verdict.checked = True
    return verdict.refusal


def _try_out(model: torch.nn.Module) -> Refusal | None:
    installed, newest = compat.installed_version(), compat.NEWEST_TESTED
    try:
        wrong = _examine(model)
    except _Undecided:
        raise
    except Exception as error:  # any error that a change in transformers leads to
        if is_the_users(error):
            raise
        wrong = f"{type(error).__name__}: {error}"
    if not wrong:
        tell_once(
            f"{type(model).__name__} tried",
            f"transformers {installed} is newer than {newest}, the newest that was tested; a short prompt was restored "
            "correctly",
        )
        return None
    refusal = Refusal(
        "version-failed",
        f"transformers {installed} is newer than {newest}, the newest that was tested, and a short prompt could not be "
        f"restored ({wrong}); update cake_hf, or install transformers<={newest}",
    )
    tell_once(f"{type(model).__name__} failed", f"{refusal.text}. Prompts are computed plainly")
    return refusal


@torch.no_grad()
def _examine(model: Any) -> str:
    """Returns what differs from chunks on a `DynamicCache`; empty if nothing does.

    Raises:
        _Undecided: the model's prompts are computed plainly at present.
        Exception: any error that a change in transformers leads to.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(TOKENS, device=home_device(model)) * 7 % min(vocabulary, 61)).unsqueeze(0)
    store = MemoryStore()
    computed, report = _by_us(model, ids, store, Strategy.COMPUTE)
    if not report.chunks_computed and torch.equal(computed, _in_pieces(model, ids, TOKENS)):
        raise _Undecided
    expected = _in_pieces(model, ids, CHUNK)
    if not torch.equal(computed, expected):
        return "other logits where it was computed"
    loaded, report = _by_us(model, ids, store, Strategy.LOAD)
    if not torch.equal(loaded, expected):
        return "other logits where it was loaded"
    return "" if report.chunks_loaded == CHUNKS else f"{report.chunks_loaded} of {CHUNKS} chunks were loaded"


def _in_pieces(model: Any, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Computes the logits with transformers alone, in forwards of `size` tokens."""
    cache = plain_cache(model)
    Presses.on(model)
    cache.presses_rest = True
    for start in range(0, TOKENS, size):
        logits = _last_logits(model, cache, ids[:, start : start + size])
    return torch.cat([logits, _next_logits(model, cache, ids)])


def _by_us(model: Any, ids: torch.Tensor, store: MemoryStore, strategy: Strategy) -> tuple[torch.Tensor, Report]:
    session = Session(
        model, store, chunk_size=CHUNK, salt="", save=True, exact=True, strategy=strategy, limits=Limits()
    )
    with closing(session):
        cache = _Trial(session, layers_for(model), None)
        new = ids
        if "logits_to_keep" not in forward_parameters(model):
            cache._prefill(ids, 1, no_progress)
            new = ids[:, cache.get_seq_length() :]
        logits = torch.cat([_last_logits(model, cache, new), _next_logits(model, cache, ids)])
        session.flush(FLUSH_SECONDS)  # chunks not saved by then cannot be loaded
    return logits, cache.report


def _next_logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return _last_logits(model, cache, ids[:, :1])


def _last_logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": True, **named_for(model, cache)}
    if "logits_to_keep" in forward_parameters(model):
        arguments["logits_to_keep"] = 1
    logits: torch.Tensor = model(**arguments)[0][:, -1]  # by position, since fields are renamed now and then
    return logits
