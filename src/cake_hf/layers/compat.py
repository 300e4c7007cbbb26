"""Differences between the supported versions of transformers: names of the cache argument, and missing kinds of layers.

Three things change from release to release: the name under which a forward and `generate` take the cache, the kinds of cache
layers, and the attributes of these layers. This module detects them by inspecting the installed version. Only
`indexer_refusal`, whose subject cannot be detected by inspection, and `is_untested` go by the version number.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import transformers
from packaging.version import Version

from cake_hf.report import Refusal
from cake_hf.util.interrupts import faults_suppressed

OLDEST = "5.0"
"""The oldest supported version of transformers."""
NEWEST_TESTED = "5.24.0"
"""The newest version with which the test suite has passed; `requirements/locked.txt` installs it."""

if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(
        f"cake_hf needs transformers {OLDEST} or newer, and {transformers.__version__} is installed: "
        f"pip install 'transformers>={OLDEST},<6'"
    )

from transformers import Cache, DynamicCache, cache_utils  # noqa: E402  # older versions may lack these

GENERATE_LINE = "# before transformers 5.24: past_key_values=cache\nmodel.generate(**inputs, cache=cache)"
"""The call with which snippets printed for users pass a cache to `generate`."""

WELL_KNOWN_FROM = Version("5.17")
"""Before this version, some models compute a different result when a prompt is run in pieces."""

CACHE_NAMES = ("cache", "past_key_values")
"""Names of a forward's cache argument: the first from 5.24 on, the second before 5.24 and in third-party models."""

T = TypeVar("T")

_signatures: WeakKeyDictionary[Any, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def installed_version() -> str:
    """Returns the version of transformers."""
    return str(sys.modules["transformers"].__version__)  # by name: transformers may replace its own module object


def is_older_than(version: str | Version) -> bool:
    """Returns whether the installed transformers is older than that version."""
    return Version(installed_version()) < (Version(version) if isinstance(version, str) else version)


def is_old() -> bool:
    """Returns whether the installed transformers is older than `WELL_KNOWN_FROM`."""
    return is_older_than(WELL_KNOWN_FROM)


def is_untested() -> bool:
    """Returns whether the installed transformers is newer than the newest tested version."""
    return Version(installed_version()) > Version(NEWEST_TESTED)


# The name of the cache argument.


def find_cache(values: Iterable[Any], kind: type[T]) -> T | None:
    """Returns the first argument value of that class, whatever the argument's name; None if there is none."""
    return next((value for value in values if isinstance(value, kind)), None)


def has_cache(arguments: Mapping[str, Any]) -> bool:
    """Returns whether named arguments include a cache, recognised by its class or by a known name."""
    return any(isinstance(value, Cache) or (name in CACHE_NAMES and value) for name, value in arguments.items())


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a call's named arguments without its cache."""
    return {
        name: value for name, value in arguments.items() if name not in CACHE_NAMES and not isinstance(value, Cache)
    }


def forward_of(model: Any) -> Callable[..., Any]:
    """Returns the forward whose signature names the cache: the class's own if a replacement's signature does not."""
    forward: Callable[..., Any] = model.forward
    if cache_name(forward) or not cache_name(type(model).forward):
        return forward
    return MethodType(type(model).forward, model)


def cache_name(forward: Callable[..., Any]) -> str:
    """Returns the name of a forward's cache argument; empty if its signature does not name one, or it takes none."""
    parameters = parameters_of(forward)
    known = [name for name in CACHE_NAMES if name in parameters and _may_be_cache(parameters[name].annotation)]
    known.sort(key=lambda name: not _is_cache(parameters[name].annotation))  # the other name may belong to a flag
    annotated = [name for name, parameter in parameters.items() if _is_cache(parameter.annotation)]
    return known[0] if known else annotated[0] if len(annotated) == 1 else ""


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a model's forward by name, without `self`."""
    return parameters_of(forward_of(model))


def takes_any(forward: Callable[..., Any]) -> bool:
    """Returns whether a forward takes arguments that its signature does not name."""
    kinds = {parameter.kind for parameter in parameters_of(forward).values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def parameters_of(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function or a bound method, without `self`."""
    function = getattr(forward, "__func__", forward)
    try:
        if function not in _signatures:
            _signatures[function] = dict(inspect.signature(function).parameters)
        parameters = _signatures[function]
    except TypeError:  # the function does not support weak references
        parameters = inspect.signature(function).parameters
    return parameters if function is forward else dict(list(parameters.items())[1:])


def named_for(model: Any, cache: Any, given_as: str = "") -> dict[str, Any]:
    """Returns the cache as a named argument of a model's forward.

    Args:
        model: the model whose forward is called.
        cache: any cache.
        given_as: the name under which the caller passed it, for a forward whose signature does not name it.
    """
    return {cache_name(forward_of(model)) or given_as or generate_name(): cache}


def renamed_for(model: Any, arguments: Mapping[str, Any], cache: Any) -> dict[str, Any] | None:
    """Returns the named arguments with the cache under the name that the forward takes; None if no change is needed.

    Hooks run before transformers' own renaming, and third-party models have no renaming.
    """
    given_as = next((name for name, value in arguments.items() if value is cache), "")
    forward = forward_of(model)
    takes = cache_name(forward)
    if not given_as or not takes or given_as == takes:
        return None
    return {takes if name == given_as else name: value for name, value in arguments.items()}


def generate_name(model: Any = None) -> str:
    """Returns the name of the cache argument of `generate`: of the model's own, or of the installed transformers."""
    from transformers import GenerationMixin  # imports a lot that a restore alone does not need

    own = [type(model).generate] if hasattr(type(model), "generate") else []
    prepare = getattr(GenerationMixin, "prepare_inputs_for_generation", None)
    named = [cache_name(function) for function in [*own, prepare] if function is not None]
    return next(filter(None, named), CACHE_NAMES[0])


def for_generate(model: Any, cache: Any) -> dict[str, Any]:
    """Returns the cache as a named argument of `model.generate`."""
    return {generate_name(model): cache}


def _may_be_cache(annotation: Any) -> bool:
    """Returns whether an annotation allows a cache. Some old models use the name for a dictionary, others may for a flag."""
    return _is_cache(annotation) or not any(kind in str(annotation) for kind in ("dict", "bool"))


def _is_cache(annotation: Any) -> bool:
    """Returns whether an annotation, evaluated or not, names a cache class."""
    if isinstance(annotation, type):
        return issubclass(annotation, Cache)
    return annotation is not inspect.Parameter.empty and "Cache" in str(annotation)


def plain_cache(model: Any) -> Any:
    """Returns an empty cache as transformers creates it for a model."""
    return DynamicCache(config=model.config)


def begin_plainly(cache: Any, config: Any) -> None:
    """Calls `DynamicCache.__init__` with the arguments that this version takes, with a config if it takes one."""
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {"config": config}), ((config,), {}), ((), {})]
    for args, named in ways:
        with faults_suppressed(Exception):  # versions reject unknown arguments with different errors
            return DynamicCache.__init__(cache, *args, **named)  # type: ignore[no-any-return]  # transformers is not typed
    return Cache.__init__(cache, layer_class_to_replicate=DynamicLayer)  # type: ignore[no-any-return]  # the same


def is_from_transformers(module: Any) -> bool:
    """Returns whether a module is a transformers model, of whatever class."""
    from transformers import PreTrainedModel  # imports a lot, but with such a model it is already imported

    return isinstance(module, PreTrainedModel)


def takes_dynamic_cache(model: Any) -> bool:
    """Returns whether a model accepts a `DynamicCache`; some have their own cache class, many in older versions."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return supports is None or bool(supports())


def chosen_functions(config: Any) -> dict[str, Any]:
    """Returns the attention, mask and expert functions that a model picks by name in its config and the config's parts."""
    configs = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    homes = ("transformers.modeling_utils", "transformers.masking_utils", "transformers.integrations.moe")
    registries = ("ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS", "ALL_EXPERTS_FUNCTIONS")
    choices = ("_attn_implementation", "_attn_implementation", "_experts_implementation")
    chosen = {}
    for home, registry, choice in zip(homes, registries, choices, strict=True):
        functions = getattr(sys.modules.get(home), registry, {})
        for name in {str(getattr(one, choice, None)) for one in configs if one is not None}:
            if (function := functions.get(name)) is not None:
                chosen[f"{registry}.{name}"] = function
    return chosen


def attention_functions() -> Any:
    """Returns transformers' registry of attention functions by name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # imports a lot that a restore alone does not need

    return ALL_ATTENTION_FUNCTIONS


def eager_attention(module: Any) -> Callable[..., Any] | None:
    """Returns the function that an attention module calls if its implementation is "eager": each family has its own."""
    homes = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    return next(filter(None, (getattr(home, "eager_attention_forward", None) for home in homes)), None)


def has_latents(config: Any) -> bool:
    """Returns whether a model's attention makes its keys and values of a latent (MLA)."""
    return bool(getattr(config.get_text_config(), "kv_lora_rank", None))


def indexer_refusal(config: Any) -> Refusal | None:
    """Returns why a model with an indexer (sparse attention) is computed plainly on this version; None if it need not be.

    Before 5.11 the model keeps the indexer's keys outside the cache, and before 5.17 it attends to the wrong tokens in every
    forward that continues earlier ones. Neither can be detected by inspection, so only this check goes by the version number.
    """
    has_indexer = any(getattr(config, name, None) for name in ("index_topk", "index_n_heads"))
    if not has_indexer or not is_old():
        return None
    return Refusal(
        "indexer-version", f"transformers before {WELL_KNOWN_FROM} computes models with an indexer wrongly in pieces"
    )


# Kinds of layers, and their attributes.


def _layer_class(name: str) -> Any:
    """Returns the cache layer class of that name, or an empty stand-in if this version has none."""
    return getattr(cache_utils, name, None) or type(f"Absent{name}", (), {})


DummyLayer = _layer_class("DummyLayer")
"""The class of layers that keep nothing. Without it, a cache has no such layer, or a recurrent one that stays empty."""
CacheLayerMixin = _layer_class("CacheLayerMixin")
DynamicLayer = _layer_class("DynamicLayer")
DynamicSlidingWindowLayer = _layer_class("DynamicSlidingWindowLayer")
DynamicIndexedLayer = _layer_class("DynamicIndexedLayer")
LinearAttentionLayer = _layer_class("LinearAttentionLayer")
LinearAttentionAndFullAttentionLayer = _layer_class("LinearAttentionAndFullAttentionLayer")


def has_numbered_states(layer: Any) -> bool:
    """Returns whether a recurrent layer keeps numbered states. Older versions keep one of each, and are not restored."""
    return hasattr(layer, "number_of_states")


def keeps_attention(layers: Iterable[Any]) -> bool:
    """Returns whether any of a cache's layers knows its length; recurrent layers alone do not."""
    return any(isinstance(layer, CacheLayerMixin) for layer in layers)


def counting_writes() -> AbstractContextManager[Any]:
    """Has tensors that are made in inference mode count writes to them, as others do; edits of KV are found by that."""
    if torch.compiler.is_dynamo_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return _counting_writes()


@contextmanager
def _counting_writes() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def drop_content(layer: Any) -> None:
    """Empties a layer before its `reset`.

    Older versions overwrite the tensors with zeros, although other code may hold them, and then append after the zeros.
    """
    layer.keys = layer.values = None
    layer.is_initialized = False
