"""What differs between the supported versions of transformers: names of the cache, and kinds of layers that a version lacks.

Three things change from release to release: what a forward and `generate` call the cache that they are given, which kinds of
cache layers there are, and what these layers have. They are found by looking at what is there. Only `indexer_reason` goes by
the version number, since what it is about does not show, and `is_untested`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import transformers
from packaging.version import Version

from cake_hf.util.interrupts import faults_suppressed

OLDEST = "5.0"
"""The oldest version of transformers that is supported."""
NEWEST_TESTED = "5.24.0"
"""The newest version that the test suite has passed with; `requirements/locked.txt` installs it."""

if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(
        f"cake_hf needs transformers {OLDEST} or newer, and {transformers.__version__} is installed: "
        f"pip install 'transformers>={OLDEST},<6'"
    )

from transformers import Cache, DynamicCache, cache_utils  # noqa: E402  # older ones may have none of these

GENERATE_LINE = "model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache"
"""How a snippet that is printed for people hands a cache over."""

WELL_KNOWN_FROM = Version("5.17")
"""Before it, some models compute something else where a prompt is run in pieces."""

CACHE_NAMES = ("cache", "past_key_values")
"""What forwards call the cache that they are given: from 5.24 on; before it, and in models from elsewhere."""

T = TypeVar("T")

_signatures: WeakKeyDictionary[Any, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def installed_version() -> str:
    """Of transformers."""
    return str(sys.modules["transformers"].__version__)  # which puts another module into its own place now and then


def is_old() -> bool:
    """Whether the installed transformers is one of those before `WELL_KNOWN_FROM`."""
    return Version(installed_version()) < WELL_KNOWN_FROM


def is_untested() -> bool:
    """Whether the installed transformers is newer than the newest that was tested."""
    return Version(installed_version()) > Version(NEWEST_TESTED)


# What the cache is called.


def find_cache(values: Iterable[Any], kind: type[T]) -> T | None:
    """The first cache of that class among a call's arguments, whatever its name; None if there is none."""
    return next((value for value in values if isinstance(value, kind)), None)


def has_cache(arguments: Mapping[str, Any]) -> bool:
    """Whether named arguments bring a cache, by its class or by a known name."""
    return any(isinstance(value, Cache) or (name in CACHE_NAMES and value) for name, value in arguments.items())


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The call's named arguments without its cache."""
    return {
        name: value for name, value in arguments.items() if name not in CACHE_NAMES and not isinstance(value, Cache)
    }


def forward_of(model: Any) -> Callable[..., Any]:
    """The forward whose signature says what a model takes: that of its class, where one put in its place does not."""
    forward: Callable[..., Any] = model.forward
    if cache_name(forward) or not cache_name(type(model).forward):
        return forward
    return MethodType(type(model).forward, model)


def cache_name(forward: Callable[..., Any]) -> str:
    """What a forward calls the cache that it takes; empty if its signature does not say, or it takes none."""
    parameters = parameters_of(forward)
    known = [name for name in CACHE_NAMES if name in parameters and _may_be_cache(parameters[name].annotation)]
    known.sort(key=lambda name: not _is_cache(parameters[name].annotation))  # a flag may have the other name
    annotated = [name for name, parameter in parameters.items() if _is_cache(parameter.annotation)]
    return known[0] if known else annotated[0] if len(annotated) == 1 else ""


def takes_any(forward: Callable[..., Any]) -> bool:
    """Whether a forward takes arguments that its signature does not name."""
    kinds = {parameter.kind for parameter in parameters_of(forward).values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def parameters_of(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a bound method or a function, without `self`."""
    function = getattr(forward, "__func__", forward)
    try:
        if function not in _signatures:
            _signatures[function] = dict(inspect.signature(function).parameters)
        parameters = _signatures[function]
    except TypeError:  # nothing can refer to it weakly
        parameters = inspect.signature(function).parameters
    return parameters if function is forward else dict(list(parameters.items())[1:])


def named_for(model: Any, cache: Any, given_as: str = "") -> dict[str, Any]:
    """The cache as a named argument of a model's forward.

    Args:
        model: whose forward is called.
        cache: any.
        given_as: the name under which the caller gave it, for a forward whose signature does not say.
    """
    return {cache_name(forward_of(model)) or given_as or generate_name(): cache}


def renamed_for(model: Any, arguments: Mapping[str, Any], cache: Any) -> dict[str, Any] | None:
    """The named arguments with the cache under the name that the forward takes; None if they are right as they are.

    Hooks run before transformers' own renaming, and models from elsewhere have none.
    """
    given_as = next((name for name, value in arguments.items() if value is cache), "")
    forward = forward_of(model)
    takes = cache_name(forward)
    if not given_as or not takes or given_as == takes:
        return None
    return {takes if name == given_as else name: value for name, value in arguments.items()}


def generate_name(model: Any = None) -> str:
    """What `generate` of the installed transformers, or that of a model, calls the cache that it takes."""
    from transformers import GenerationMixin  # it brings much with it that restoring alone does not need

    own = [type(model).generate] if hasattr(type(model), "generate") else []
    prepare = getattr(GenerationMixin, "prepare_inputs_for_generation", None)
    named = [cache_name(function) for function in [*own, prepare] if function is not None]
    return next(filter(None, named), CACHE_NAMES[0])


def for_generate(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as a named argument of `model.generate`."""
    return {generate_name(model): cache}


def _may_be_cache(annotation: Any) -> bool:
    """Whether an annotation allows a cache. Some old models use the name for a dictionary, and others may have a flag."""
    return _is_cache(annotation) or not any(kind in str(annotation) for kind in ("dict", "bool"))


def _is_cache(annotation: Any) -> bool:
    """Whether an annotation, evaluated or not, names a class of caches."""
    if isinstance(annotation, type):
        return issubclass(annotation, Cache)
    return annotation is not inspect.Parameter.empty and "Cache" in str(annotation)


def plain_cache(model: Any) -> Any:
    """An empty cache as transformers makes it for a model."""
    return DynamicCache(config=model.config)


def begin_plainly(cache: Any, config: Any) -> None:
    """Call `DynamicCache.__init__` in the way that this version takes, with a config if it takes one."""
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {"config": config}), ((config,), {}), ((), {})]
    for args, named in ways:
        with faults_suppressed(Exception):  # whatever a version says of a way that it does not take
            return DynamicCache.__init__(cache, *args, **named)  # type: ignore[no-any-return]  # transformers is not typed
    return Cache.__init__(cache, layer_class_to_replicate=DynamicLayer)  # type: ignore[no-any-return]  # the same


def takes_dynamic_cache(model: Any) -> bool:
    """Whether a model can be given a `DynamicCache`; some have a cache class of their own, in older versions many."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return supports is None or bool(supports())


def chosen_functions(config: Any) -> dict[str, Any]:
    """The functions for attention, masks and experts that models pick by the names in a config, and in its parts."""
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


def indexer_reason(config: Any) -> str:
    """Why a model with an indexer (sparse attention) is computed plainly on this version; empty if it need not be.

    Before 5.11 the model keeps the indexer's keys to itself, and before 5.17 it attends to the wrong tokens in every forward
    that goes on from others. Neither shows in what there is, so this is the one place that goes by the number.
    """
    has_indexer = any(getattr(config, name, None) for name in ("index_topk", "index_n_heads"))
    if not has_indexer or not is_old():
        return ""
    return f"transformers before {WELL_KNOWN_FROM} computes models with an indexer wrongly in pieces"


# Kinds of layers, and what they have.


def _layer_class(name: str) -> Any:
    """A class of cache layers, or an empty stand-in where this version has none of that name."""
    return getattr(cache_utils, name, None) or type(f"Absent{name}", (), {})


DummyLayer = _layer_class("DummyLayer")
"""Of layers that keep nothing. Where it is absent, a cache has no layer for these, or a recurrent one that stays empty."""
CacheLayerMixin = _layer_class("CacheLayerMixin")
DynamicLayer = _layer_class("DynamicLayer")
DynamicSlidingWindowLayer = _layer_class("DynamicSlidingWindowLayer")
DynamicIndexedLayer = _layer_class("DynamicIndexedLayer")
LinearAttentionLayer = _layer_class("LinearAttentionLayer")
LinearAttentionAndFullAttentionLayer = _layer_class("LinearAttentionAndFullAttentionLayer")


def has_numbered_states(layer: Any) -> bool:
    """Whether a recurrent layer keeps its states by number. Older versions have one of each, and are not restored."""
    return hasattr(layer, "number_of_states")


def keeps_attention(layers: Iterable[Any]) -> bool:
    """Whether any of a cache's layers can tell how long it is; recurrent layers alone cannot."""
    return any(isinstance(layer, CacheLayerMixin) for layer in layers)


def drop_content(layer: Any) -> None:
    """Empty a layer before its `reset`.

    Older versions fill the tensors with zeros, although others may hold them, and append after the zeros.
    """
    layer.keys = layer.values = None
    layer.is_initialized = False
