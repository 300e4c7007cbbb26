"""The interface of all methods: a press takes a restored cache and returns another that `generate` goes on with.

    cache.prefill(document)
    small = ThinK(ratio=0.5)(model, cache)
    model.generate(document_and_question, cache=small)  # before transformers 5.24: past_key_values=small

The restored cache is not changed, so any number of methods run on one restore. What a press returns is not exact, so it is
never stored; nothing else in the package imports this folder.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache

from cake_hf.cache.cake_cache import CakeCache
from cake_hf.errors import CakeError
from cake_hf.layers import TokenMajorLayer
from cake_hf.layers.compat import DynamicLayer, has_latents
from cake_hf.presses.attention import Attention, AttentionCall
from cake_hf.presses.cache import PressedCache, PressReport, nbytes
from cake_hf.presses.layers import PressedLayer
from cake_hf.presses.window import Recorded, record

QUERIES = 8
"""Queries of which the error is measured."""


@dataclass(frozen=True)
class Prefix:
    """What a press works on.

    Attributes:
        model: the model.
        keys, values: of each layer, `[1, heads, tokens, head_dim]`: a copy of its own, keys with their positions.
        ids: `[1, tokens]`; None if they are not known.
        window: per layer the last queries of the prefix; empty if they were not asked for.
    """

    model: torch.nn.Module
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    ids: torch.Tensor | None
    window: list[Recorded]

    @property
    def tokens(self) -> int:
        """Tokens of the prefix."""
        return int(self.keys[0].shape[-2])

    def plain_layer(self, number: int) -> PressedLayer:
        """Returns a layer that keeps everything."""
        return PressedLayer(self.keys[number], self.values[number], self.tokens)


class Press:
    """The base of all methods. A subclass defines `layer`, or `layers` if layers depend on each other.

    A method is a frozen dataclass of its options; one that makes no sense is a `ValueError`.
    """

    needs_queries = False
    """Whether the method looks at the queries of the last tokens."""
    window = 32
    """How many of them."""

    def __call__(
        self, model: torch.nn.Module, cache: Cache, ids: torch.Tensor | None = None, *, measure: bool = True
    ) -> PressedCache:
        """Returns a pressed copy of a cache; its `report` has bytes and error.

        Args:
            model: the model whose KV the cache holds.
            cache: a `CakeCache` after `prefill`, or a `DynamicCache`, with one prompt in it; it is not changed.
            ids: `[1, tokens]` of at least what the cache holds. A `CakeCache` after `prefill` knows them; with a `DynamicCache`
                they are needed by methods that look at queries, and to measure the error.
            measure: also measure the error, which takes a forward of the last tokens.

        Raises:
            CakeError: the cache is empty or has several rows; a layer is of a kind that presses are not made for; the ids are
                needed and not known; or the model's attention is not one that can be pressed.
        """
        started = time.monotonic()
        prefix = taken(model, cache, ids, str(self))
        if prefix.ids is None and self.needs_queries:
            raise CakeError(f"{self} looks at the last queries of the prompt: pass its token ids as ids=...")
        if self.needs_queries or measure:
            prefix = with_window(prefix, self.window)
        if self.needs_queries and not prefix.window:
            raise CakeError(f"{self} looks at the queries of the text behind the last image, and there is none.")
        before = nbytes([*prefix.keys, *prefix.values])
        layers = self.layers(prefix)
        seconds = time.monotonic() - started
        error = error_of(prefix, layers) if measure else None
        report = PressReport(
            press=str(self),
            tokens=prefix.tokens,
            entries=[layer.entries for layer in layers],
            bytes_before=before,
            bytes_after=nbytes(tensor for layer in layers for tensor in layer.state()),
            error=error,
            seconds=seconds,
        )
        return PressedCache(model, layers, report)

    def layers(self, prefix: Prefix) -> list[PressedLayer]:
        """Returns all layers of the pressed cache."""
        return [self.layer(prefix, number) for number in range(len(prefix.keys))]

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        """Returns one layer of the pressed cache. Its tensors must not be views of the prefix's, which would keep all of it."""
        raise NotImplementedError


def check_share(name: str, value: float) -> None:
    """Checks an option that is a share.

    Raises:
        ValueError: it is not in 0..1.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a share between 0 and 1, not {value!r}.")


def taken(model: Any, cache: Cache, ids: torch.Tensor | None, press: str) -> Prefix:
    """Returns a copy of what a cache holds; arguments and errors are those of `Press.__call__`.

    Args:
        press: the method's name, for errors.
    """
    if isinstance(cache, PressedCache):
        raise CakeError("This cache is pressed already; give the restored one to each press.")
    for number, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, TokenMajorLayer):
            raise CakeError(
                f"{press} is made for layers that keep a key and a value of each token, and layer {number} of this model is a "
                f"{type(layer).__name__}."
            )
    if has_latents(model.config):
        raise CakeError(f"{press} is made for keys and values of heads, and this model keeps latents (MLA).")
    layers, known = cache.copied_content() if isinstance(cache, CakeCache) else (cache.layers, None)
    if not layers or not all(layer.get_seq_length() for layer in layers):
        raise CakeError("The cache holds no tokens that could be pressed; call its prefill first.")
    keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
    rows, tokens = keys[0].shape[0], keys[0].shape[-2]
    if rows != 1:
        raise CakeError(f"A press takes the cache of one prompt, and this one has {rows} rows.")
    if ids is not None and (ids.shape[0] != 1 or ids.shape[1] < tokens):
        raise CakeError(
            f"The ids have the shape {tuple(ids.shape)}, and the cache holds {tokens} tokens of one prompt."
        )
    ids = known if ids is None else ids[:, :tokens]
    return Prefix(model, [*map(copied, keys)], [*map(copied, values)], ids, [])


def copied(states: torch.Tensor) -> torch.Tensor:
    """Returns a copy that is no view of something larger."""
    return states.clone(memory_format=torch.contiguous_format)


def with_window(prefix: Prefix, window: int = QUERIES) -> Prefix:
    """Adds the last queries, if the ids are known. The window ends where an image does: its tokens would run without it."""
    model, ids = prefix.model, prefix.ids
    if ids is None or not (tokens := min(max(window, QUERIES), text_at_end(model, ids))):
        return prefix
    return replace(prefix, window=record(model, prefix.keys, prefix.values, ids, tokens))


def text_at_end(model: Any, ids: torch.Tensor) -> int:
    """Returns how many tokens of a prompt lie behind its last image or video: all if it has none."""
    names = ("image_token_id", "video_token_id")
    places = [number for name in names if (number := getattr(model.config, name, None)) is not None]
    found = torch.isin(ids[0], torch.tensor(places, dtype=ids.dtype, device=ids.device)).nonzero()
    return ids.shape[1] - (int(found[-1]) + 1 if len(found) else 0)


def error_of(prefix: Prefix, layers: list[PressedLayer]) -> float | None:
    """Returns the mean over all layers of the error of attention, on copies of what a press made; None without a window."""
    if not prefix.window:
        return None
    errors = []
    for recorded, keys, values, layer in zip(prefix.window, prefix.keys, prefix.values, layers, strict=True):
        pressed = copy.deepcopy(layer)
        queries = recorded.queries[:, :, -QUERIES:].split(1, dim=-2)
        right = torch.cat([recorded.attention(query, keys, values, None)[0] for query in queries], dim=1)
        found = torch.cat([_attended(pressed, recorded.attention, query) for query in queries], dim=1)
        errors.append(float((found.float() - right.float()).norm() / right.float().norm().clamp_min(1e-30)))
    return sum(errors) / len(errors)


def _attended(layer: PressedLayer, attention: Attention, query: torch.Tensor) -> torch.Tensor:
    return layer.attend(AttentionCall(attention, query, layer.keys, layer.values, None))[0]
