"""What can be restored, and if not, why.

A model that none of our caches can serve is refused with an error. Everything else that is not (yet) restored is computed
plainly: a function returns a `Refusal`, and the cache puts it on its report.
"""

from __future__ import annotations

import logging
import re
import traceback
import weakref
import zlib
from types import FrameType
from typing import Any

import torch

from cake_hf.errors import CakeError, UnsupportedModel
from cake_hf.layers import RecurrentLayer, TokenMajorLayer, ours_for
from cake_hf.layers.compat import (
    CACHE_NAMES,
    LinearAttentionLayer,
    cache_name,
    forward_of,
    indexer_refusal,
    installed_version,
    is_old,
    keeps_attention,
    plain_cache,
    takes_any,
    takes_dynamic_cache,
)
from cake_hf.layers.kinds import check_stand_in, is_ours
from cake_hf.model.code import is_users_code
from cake_hf.model.foreign_code import LIBRARIES
from cake_hf.model.kv_layout import keep_each_token_once, kv_template, layers_with_tokens
from cake_hf.model.look import parameters_of
from cake_hf.model.ranks import parallel_refusal, ranks_of
from cake_hf.model.trials import differs_beyond_window, differs_in_pieces, forgets, looks_ahead
from cake_hf.model.weights import offloaded_weights, unknown_weights
from cake_hf.report import Refusal
from cake_hf.restore.request import ForwardCall
from cake_hf.util.interrupts import faults_suppressed, is_the_users

logger = logging.getLogger("cake_hf")

_FAILED_THEMSELVES = re.compile("out of memory|DefaultCPUAllocator|CUDA error")

_misunderstood: weakref.WeakKeyDictionary[torch.nn.Module, Refusal] = weakref.WeakKeyDictionary()
_told: set[str] = set()

TRAINING = Refusal("training-mode", "the model is in training mode")
MIXED_ADAPTERS = Refusal("mixed-adapters", "adapters are chosen by the row, or by the place in the prompt")
BYPASSED = Refusal(
    "cache-not-used",
    "generate ran the model without the cache that it was given; leave out the option that has it do so",
)
NO_CUTS_IN_BATCH = Refusal(
    "batch-boundaries",
    "boundaries are for a prompt without padding, or for equal ones; those of this batch are left out",
)
CLOSED = Refusal("closed", "this CakeCache is closed; make a new one to have prompts restored")
NOT_USED_YET = Refusal(
    "no-prompt-yet", "no prompt has come with this cache yet; pass it to the model's generate as the cache"
)
KEEPS_NO_ATTENTION = Refusal(
    "no-attention", "this model keeps no attention at all, so its cache cannot tell how long it is"
)


def refuse_unusable(model: torch.nn.Module) -> None:
    """Raises an error for a model that cannot be given a cache of ours.

    Raises:
        UnsupportedModel: on the meta device, encoder-decoder, with a cache class of its own, or a forward that takes no cache.
    """
    name = type(model).__name__
    empty = {path for path, weight in parameters_of(model) if weight.device.type == "meta"}
    if empty and not empty <= offloaded_weights(model).keys():
        raise UnsupportedModel(f"{name} has weights on the meta device; load the weights before making a CakeCache.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; CakeCache serves decoder-only models.")
    if not takes_dynamic_cache(model):
        raise UnsupportedModel(
            f"{name} has a cache class of its own in transformers {installed_version()}; a newer version may have none."
        )
    if not _takes_cache(model):
        raise UnsupportedModel(f"{name}.forward takes no cache; CakeCache cannot be handed to it.")


def layers_or_refusal(model: torch.nn.Module) -> tuple[list[Any], Refusal | None]:
    """Returns layers for a cache, ours for the kinds we know, and why the model's prompts are computed plainly, if so.

    The list of layers is empty if the model is not understood at all.
    """
    try:
        layers = layers_for(model)
        return layers, model_refusal(model, layers)
    except Exception as error:  # any error that an unknown version or model leads to
        if is_the_users(error):
            raise
        return [], not_understood(model, error)


def layers_for(model: torch.nn.Module) -> list[Any]:
    """Returns the layers that `DynamicCache` would have, with the kinds that we know replaced by ours.

    Raises:
        Exception: ours would behave differently.
    """
    sample_cache, layers = plain_cache(model), plain_cache(model).layers
    if not isinstance(layers, list):
        raise TypeError(f"a cache keeps its layers as {type(layers).__name__}")
    if keeps_attention(layers) and sample_cache.get_seq_length():
        raise TypeError("a new cache is not empty")
    for sample in {type(layer): layer for layer in sample_cache.layers}.values():
        check_stand_in(sample, ours_for(sample))
    return [ours_for(layer) for layer in layers]


def plain_layers(model: torch.nn.Module) -> list[Any]:
    """Returns the layers of a plain cache; an empty list if it makes them only as they are needed."""
    with faults_suppressed(Exception):  # these faults were logged already
        return list(plain_cache(model).layers)
    return []


def model_refusal(model: torch.nn.Module, layers: list[Any]) -> Refusal | None:
    """Returns why this model's prompts are computed plainly; None if they can be restored."""
    other = sorted({type(layer).__name__ for layer in layers if not is_ours(layer)})
    if other or not layers:
        named = ", ".join(other) or "no layers we know"
        return Refusal("layer-kinds", f"this model keeps {named}, which cannot be restored yet")
    if not keeps_attention(layers):
        return KEEPS_NO_ATTENTION
    if refusal := indexer_refusal(model.config):
        return refusal
    if lengthy := _rope_types(model.config) & {"dynamic", "longrope"}:
        return Refusal(
            "rope-scaling", f"this model's rope scaling ({min(lengthy)}) depends on the length of the whole input"
        )
    if kind := unknown_weights(model):
        return Refusal("weight-format", f"this model keeps weights as {kind}, whose content cannot be told")
    return parallel_refusal(model)


def not_understood(model: torch.nn.Module, error: Exception) -> Refusal:
    """Logs, once per kind, that a model is not understood, and remembers it; returns the reason for computing plainly.

    Not remembered: a `RuntimeError`, which may not occur again, and an `IndexError`, which an id without an embedding causes.
    """
    kind = f"{type(model).__name__} {type(error).__name__}"
    refusal = Refusal(
        "not-understood",
        f"cake_hf does not understand this {type(model).__name__} ({type(error).__name__}: {error})",
    )
    if type(error) in (RuntimeError, IndexError):
        tell_once(kind, f"{refusal.text}. This prompt is computed plainly")
    else:
        _misunderstood[model] = refusal
        tell_once(kind, f"{refusal.text}. Prompts are computed plainly")
    return refusal


def misunderstood_refusal(model: torch.nn.Module) -> Refusal | None:
    """Returns why a model is computed plainly after it was not understood before; None if it was, or was not tried."""
    return _misunderstood.get(model)


def passes(model: torch.nn.Module, refusal: Refusal | None) -> bool:
    """Returns whether a refusal is of one prompt alone: the model was not understood in it, and this was not remembered."""
    return refusal is not None and refusal.code == "not-understood" and model not in _misunderstood


def unseen_refusal(model: torch.nn.Module) -> Refusal:
    """Returns the reason for a prompt that the hook on the model has not seen. Logged once per kind of model."""
    refusal = Refusal(
        "called-directly",
        f"the forward of {type(model).__name__}, or a part of it, was called directly; call the model, or its generate, to "
        "have prompts restored",
    )
    tell_once(f"{type(model).__name__} unseen", f"{refusal.text}. Prompts are computed plainly")
    return refusal


def tell_once(kind: str, sentence: str, level: int = logging.WARNING) -> None:
    """Logs a sentence at `level` if it is the first of its kind in this process; at debug level otherwise."""
    logger.log(logging.DEBUG if kind in _told else level, "%s.", sentence)
    _told.add(kind)


def tell_plain(refusal: Refusal) -> None:
    """Logs, once per kind of reason, that a prompt is computed plainly."""
    tell_once(re.sub(r"\d+", "", refusal.text), f"A prompt is computed plainly: {refusal.text}", logging.INFO)


def is_misunderstanding(model: torch.nn.Module, error: Exception) -> bool:
    """Returns whether an error during a restore may come from how we call the model, so that a plain call could succeed.

    Errors that pass through the user's code (hooks, signal handlers, stopping criteria) are the user's. Errors that we raise on
    purpose are passed on, too, and so are failures of the machine. Ranks of a tensor-parallel model must all act alike.
    """
    if isinstance(error, (CakeError, MemoryError, torch.OutOfMemoryError, OSError)) or ranks_of(model) is not None:
        return False
    if is_the_users(error):
        return False
    if isinstance(error, RuntimeError) and _FAILED_THEMSELVES.search(str(error)):
        return False
    return not any(_is_the_users(frame, model) for frame, _ in traceback.walk_tb(error.__traceback__))


def _is_the_users(frame: FrameType, model: torch.nn.Module) -> bool:
    """Returns whether code is neither ours nor the model's, and was not installed as a library."""
    own = (*LIBRARIES, type(model).__module__.split(".")[0])
    return is_users_code(str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename, own)


def _may_keep_attention(layers: list[Any]) -> bool:
    return not layers or keeps_attention(layers)


def _takes_cache(model: torch.nn.Module) -> bool:
    """Returns whether the model's forward can be given a cache.

    A name that we do not know counts if the cache is for attention (a Mamba model of older versions has a cache for its states
    alone). `**kwargs` count in a model that generates and is not transformers' own, since transformers' models name
    what they take.
    """
    forward = forward_of(model)
    if name := cache_name(forward):
        return name in CACHE_NAMES or _may_keep_attention(plain_layers(model))
    from_elsewhere = not type(model).__module__.startswith("transformers.")
    return takes_any(forward) and from_elsewhere and hasattr(model, "prepare_inputs_for_generation")


def ranks_refusal(model: torch.nn.Module, call: ForwardCall, chunk_size: int, *, refused: bool) -> Refusal | None:
    """Returns why the ranks of a tensor-parallel model cannot restore a prompt together; None for a model alone.

    Args:
        model: a model of a kind that can be restored. If it is tensor-parallel, all ranks have to call this.
        call: with the prompt.
        chunk_size: tokens.
        refused: this rank by itself would not restore it.
    """
    ranks = ranks_of(model)
    if ranks is None:
        return None
    content = zlib.crc32(call.ids.cpu().contiguous().numpy().tobytes()) if call.tokens else 0
    alike = ranks.all_alike([call.past, call.tokens, chunk_size, content, refused])
    return None if alike else Refusal("ranks-differ", "the ranks of the tensor-parallel model were not called alike")


def kept_refusal(model: torch.nn.Module, layers: list[Any], tokens: int) -> Refusal | None:
    """Returns why what a model keeps, as seen when it runs, cannot be restored now; None if it can."""
    template = kv_template(model)
    if any(isinstance(layer, RecurrentLayer) and layer.record_past for layer in layers):
        return Refusal(
            "recorded-states",
            "the states' past is being recorded for assisted decoding, which cannot be restored yet",
        )
    if any(hasattr(getattr(layer, "keys", None), "device_mesh") for layer in template):
        return Refusal("distributed-kv", "this model keeps KV as distributed tensors, which cannot be restored yet")
    if any(getattr(layer, "indexer_position_ids", None) is not None for layer in template):
        return Refusal(
            "indexer-positions",
            "this model's indexer keeps positions beside its keys, which cannot be restored yet",
        )
    if not keep_each_token_once(template):
        return Refusal("token-count", "this model keeps another number of tokens than it is given")
    if any(isinstance(layer, LinearAttentionLayer) for layer in template) and forgets(model):
        return Refusal(
            "forgets-state",
            "this model forgets its recurrent state where a prompt is cut, so that prompts can only be run in one piece",
        )
    if not layers_with_tokens(template):
        return KEEPS_NO_ATTENTION
    if differs_beyond_window(model, tokens):
        return Refusal(
            "beyond-window",
            "this model gives other results for a prompt longer than its window in pieces than in one",
        )
    is_unknown = is_old() or not type(model).__module__.startswith("transformers.")
    if is_unknown and differs_in_pieces(model):
        return Refusal(
            "pieces-differ",
            "this model gives other results for a prompt in pieces than in one, so that prompts can only be run in one piece",
        )
    return None


def ahead_refusal(model: torch.nn.Module) -> Refusal | None:
    """Returns why prompts of a model can only be run in one piece, if a token's KV depends on later ones; else None.

    The first call for a model runs it twice, on a few tokens.
    """
    if not looks_ahead(model):
        return None
    return Refusal(
        "looks-ahead",
        "this model's KV of a token depends on the tokens behind it, so that prompts can only be run in one piece",
    )


def cut_image_refusal(chunk: int) -> Refusal:
    """Returns why everything from that chunk on belongs to the suffix."""
    return Refusal(
        "image-across-chunks",
        f"from chunk {chunk} on the prompt is computed in one piece, since an image lies across that chunk's end, and its "
        "tokens see each other in both directions; another chunk_size may cut elsewhere",
    )


def batch_refusal(layers: list[Any]) -> Refusal | None:
    """Returns why batches on these layers are computed plainly; None if they can be restored."""
    other = sorted({type(layer).__name__ for layer in layers if type(layer) is not TokenMajorLayer})
    if not other:
        return None
    return Refusal("batch-layers", f"batches cannot be restored where a model keeps {', '.join(other)}")


def _rope_types(config: Any) -> set[str]:
    """Returns all rope types in a config's rope parameters, whether or not these are nested per layer type."""
    found: set[str] = set()

    def search(value: Any) -> None:
        if isinstance(value, dict):
            found.update(str(value[name]) for name in ("rope_type", "type") if isinstance(value.get(name), str))
            for inner in value.values():
                search(inner)

    search(getattr(config, "rope_parameters", None))
    search(getattr(config, "rope_scaling", None))
    return found
