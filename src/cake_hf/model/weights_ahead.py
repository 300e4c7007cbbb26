"""The checksum of a model's weights, computed in a thread beside the short forward that a first prompt begins with.

Both are part of the namespace. A forward of two tokens keeps few cores busy, and computing a checksum one.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from itertools import chain

import torch

from cake_hf.model.fingerprint import is_digest_known, weights_digest
from cake_hf.model.weights import Weight, weights
from cake_hf.util.forks import Lock, refusal

logger = logging.getLogger("cake_hf")

_under_way: weakref.WeakKeyDictionary[torch.nn.Module, threading.Thread] = weakref.WeakKeyDictionary()
_lock = Lock()


def begin_digest(model: torch.nn.Module, *, portable: bool) -> None:
    """Starts to compute the checksum of a model's weights, unless it is known. Call `await_digest` before it is used.

    What the thread finds counts only if the weights are then still the same, as for any checksum that is remembered. A model
    whose weights are not all in host memory is left alone: hooks may move them during a forward, and a GPU has other work.

    Args:
        model: whose forward may run meanwhile.
        portable: as for `weights_digest`.
    """
    if is_digest_known(model, portable=portable):
        return
    found = list(chain.from_iterable(weights(model)))
    if not all(weight.in_place and weight.tensor.device.type == "cpu" for weight in found):
        return
    thread = threading.Thread(target=_digest, args=(model, portable, found), name="cake-weights", daemon=True)
    with _lock:
        if model in _under_way:
            return
        _under_way[model] = thread
    if refusal(thread) is not None:  # it is computed when it is needed
        with _lock:
            _under_way.pop(model, None)


def await_digest(model: torch.nn.Module) -> None:
    """Waits for the thread that `begin_digest` started, if there is one."""
    with _lock:
        thread = _under_way.pop(model, None)
    if thread is not None:
        thread.join()


def _digest(model: torch.nn.Module, portable: bool, found: Sequence[Weight]) -> None:
    try:
        weights_digest(model, portable=portable, found=found)
    except Exception as error:  # an error that lasts is raised where the checksum is needed
        logger.debug("The weights' checksum is computed later: %s", error)
