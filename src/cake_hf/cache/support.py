"""What can be restored, and if not, why: the one place where the library says so.

A model that no cache of ours can serve is refused with an error. Everything else that is not (yet) restored is computed
plainly, and the sentence from here goes to `report.reason`.
"""

from __future__ import annotations

import inspect
import zlib
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from cake_hf.arithmetic.errors import UnsupportedModel
from cake_hf.cache.call import ForwardCall
from cake_hf.cache.layers import RecurrentLayer, TokenMajorLayer, ours_for
from cake_hf.cache.layers.kinds import is_ours
from cake_hf.cache.probe import forgets, keeps_tokens, kv_like
from cake_hf.tensors.offload import offloaded_weights
from cake_hf.tensors.parallel import parallel_reason, ranks_of
from cake_hf.tensors.tree import parameters_of
from cake_hf.tensors.weights import unknown_weights


def resolve_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model itself, also when it is wrapped by PEFT."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model


def refuse_unusable(model: torch.nn.Module) -> None:
    """Raise for a model that cannot be given a cache of ours.

    Raises:
        UnsupportedModel: on the meta device, encoder-decoder, or without `past_key_values`.
    """
    name = type(model).__name__
    empty = {path for path, weight in parameters_of(model) if weight.device.type == "meta"}
    if empty and not empty <= offloaded_weights(model).keys():
        raise UnsupportedModel(f"{name} has weights on the meta device; load the weights before making a CakeCache.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; CakeCache serves decoder-only models.")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"{name}.forward takes no `past_key_values`; CakeCache cannot be handed to it.")


def layers_for(model: torch.nn.Module) -> list[Any]:
    """The layers `DynamicCache` would have, with those whose kind we know replaced by ours."""
    return [ours_for(layer) for layer in DynamicCache(config=model.config).layers]


def model_reason(model: torch.nn.Module, layers: list[Any]) -> str:
    """Why this model's prompts are computed plainly; empty if they can be restored."""
    other = sorted({type(layer).__name__ for layer in layers if not is_ours(layer)})
    if other or not layers:
        return f"this model keeps {', '.join(other) or 'no layers we know'}, which cannot be restored yet"
    if "dynamic" in _rope_types(model.config):
        return "this model's dynamic rope scaling depends on earlier prompts"
    if kind := unknown_weights(model):
        return f"this model keeps weights as {kind}, whose content cannot be told"
    return parallel_reason(model)


def unlike_reason(model: torch.nn.Module, call: ForwardCall, chunk_size: int, reason: str) -> str:
    """Why the ranks of a tensor-parallel model cannot restore a prompt together; empty for a model alone.

    Args:
        model: of a kind that can be restored. If it is tensor-parallel, all ranks have to come here.
        call: with the prompt.
        chunk_size: tokens.
        reason: why this rank by itself would not restore it.
    """
    ranks = ranks_of(model)
    if ranks is None:
        return ""
    content = zlib.crc32(call.ids.cpu().contiguous().numpy().tobytes()) if call.tokens else 0
    alike = ranks.all_alike([call.past, call.tokens, chunk_size, content, bool(reason)])
    return "" if alike else "the ranks of the tensor-parallel model were not called alike"


def kept_reason(model: torch.nn.Module, layers: list[Any]) -> str:
    """Why what a model turns out to keep, when it is run, cannot be restored now; empty if it can.

    Args:
        model: of a kind whose layers we know.
        layers: of the cache.
    """
    like = kv_like(model)
    if any(isinstance(layer, RecurrentLayer) and layer.record_past for layer in layers):
        return "the states' past is being recorded for assisted decoding, which cannot be restored yet"
    if any(hasattr(getattr(layer, "keys", None), "device_mesh") for layer in like):
        return "this model keeps KV as distributed tensors, which cannot be restored yet"
    if any(getattr(layer, "indexer_position_ids", None) is not None for layer in like):
        return "this model's indexer keeps positions beside its keys, which cannot be restored yet"
    if any(isinstance(layer, LinearAttentionLayer) for layer in like) and forgets(model):
        return (
            "this model forgets its recurrent state where a prompt is cut, so that prompts can only be run in one piece"
        )
    if not any(keeps_tokens(layer) for layer in like):
        return "this model keeps no attention at all, so its cache cannot tell how long it is"
    return ""


def cut_image_reason(chunk: int) -> str:
    """Why all from that chunk on is the last piece."""
    return (
        f"from chunk {chunk} on the prompt is computed in one piece, since an image lies across that chunk's end, and its "
        "tokens see each other in both directions; another chunk_size may cut elsewhere"
    )


def batch_reason(layers: list[Any]) -> str:
    """Why batches on these layers are computed plainly; empty if they can be restored."""
    other = sorted({type(layer).__name__ for layer in layers if type(layer) is not TokenMajorLayer})
    return f"batches cannot be restored where a model keeps {', '.join(other)}" if other else ""


def _rope_types(config: Any) -> set[str]:
    """All rope types in a config's rope parameters, nested per layer type or not."""
    found: set[str] = set()

    def search(value: Any) -> None:
        if isinstance(value, dict):
            found.update(str(value[name]) for name in ("rope_type", "type") if isinstance(value.get(name), str))
            for inner in value.values():
                search(inner)

    search(getattr(config, "rope_parameters", None))
    search(getattr(config, "rope_scaling", None))
    return found
