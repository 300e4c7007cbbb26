"""Documents whose KV was stored alone, put one behind the other: what CacheBlend and EPIC have in common.

    documents = [CakeCache(model, store) for _ in ids]  # each after prefill(its own ids)
    small = CacheBlend(ratio=0.15)(model, documents)
    model.generate(torch.cat([*ids, question], dim=1), cache=small)

The KV of all documents but the first is wrong there in two ways. Its keys have the positions of a document that starts at 0:
they are turned on by the rotary embedding, `R(p + offset) k = R(offset) R(p) k`. And it knows nothing of the documents before
it: a method chooses tokens, whose KV is computed again, with all documents in sight.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache

from cake_hf.errors import CakeError
from cake_hf.layers.compat import forward_of, named_for, parameters_of
from cake_hf.presses.attention import Attended, AttentionCall
from cake_hf.presses.cache import PressedCache, PressReport, nbytes
from cake_hf.presses.layers import PressedLayer
from cake_hf.presses.press import Prefix, Press, taken
from cake_hf.presses.window import same_states


@dataclass(frozen=True)
class BlendReport(PressReport):
    """What a blend did.

    Attributes:
        recomputed: tokens whose KV was computed again.
    """

    recomputed: int


@dataclass
class Joined:
    """All documents, one behind the other.

    Attributes:
        model: the model.
        keys, values: of each layer, `[1, heads, tokens, head_dim]`, keys with their new positions.
        ids: `[1, tokens]`.
        starts: where each document starts, and the end of the last one.
    """

    model: Any
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    ids: torch.Tensor
    starts: list[int]

    @property
    def first(self) -> int:
        """Tokens of the first document, whose KV is right as it is."""
        return self.starts[1]


class Blend:
    """The base of both methods. A subclass defines `chosen`."""

    compared = 0
    """The last layer in which the method compares stored KV with what the model computes."""

    def __call__(
        self,
        model: torch.nn.Module,
        documents: Sequence[Cache],
        ids: Sequence[torch.Tensor] | None = None,
        *,
        measure: bool = True,
    ) -> PressedCache:
        """Returns a cache of all documents, in this order; its `report` is a `BlendReport`.

        Args:
            model: the model whose KV the caches hold.
            documents: a cache for each, as a `Press` takes it, with positions from 0; they are not changed.
            ids: the token ids of each, `[1, tokens]`; a `CakeCache` after `prefill` knows them.
            measure: also measure the error, for which the whole prompt is computed once.

        Raises:
            CakeError: as for a `Press`; or the model does not give tokens their positions by rotary embedding.
        """
        started = time.monotonic()
        if not documents:
            raise CakeError(f"{self} needs at least one document.")
        given = ids if ids is not None else [None] * len(documents)
        if len(given) != len(documents):
            raise CakeError(f"Each document has its token ids: for {len(documents)} documents {len(given)} were given.")
        prefixes = [taken(model, cache, one, str(self)) for cache, one in zip(documents, given, strict=True)]
        joined = self._joined(prefixes)
        places = self._places(joined)
        layers = recomputed(joined, places)
        sizes = [nbytes([*keys, *values]) for keys, values in ((one.keys, one.values) for one in prefixes)]
        seconds = time.monotonic() - started
        report = BlendReport(
            press=str(self),
            tokens=joined.starts[-1],
            entries=[layer.entries for layer in layers],
            bytes_before=sum(sizes),
            bytes_after=nbytes(tensor for layer in layers for tensor in layer.state()),
            error=_error(joined, layers) if measure else None,
            seconds=seconds,
            recomputed=len(places),
        )
        return PressedCache(model, layers, report)

    def chosen(self, joined: Joined, fresh: list[PressedLayer]) -> torch.Tensor:
        """Returns which tokens behind the first document are computed again, in their order.

        Args:
            joined: all documents.
            fresh: the layers up to `compared`, with KV as the model computes it for the whole prompt.
        """
        raise NotImplementedError

    def _joined(self, prefixes: list[Prefix]) -> Joined:
        model, starts = prefixes[0].model, [0]
        for prefix in prefixes:
            starts.append(starts[-1] + prefix.tokens)
        ids = [prefix.ids for prefix in prefixes if prefix.ids is not None]
        if len(ids) < len(prefixes):
            raise CakeError(f"{self} computes tokens again: pass the token ids of all documents as ids=...")
        buffers = (buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
        frequencies = next(buffers, None)
        if frequencies is None:
            raise CakeError(f"{self} is made for rotary positions, and this model has none.")
        count = range(len(prefixes[0].keys))
        keys = [
            torch.cat(
                [turned(one.keys[n], start, frequencies) for one, start in zip(prefixes, starts, strict=False)], dim=-2
            )
            for n in count
        ]
        values = [torch.cat([one.values[n] for one in prefixes], dim=-2) for n in count]
        return Joined(model, keys, values, torch.cat([one.to(keys[0].device) for one in ids], dim=1), starts)

    def _places(self, joined: Joined) -> torch.Tensor:
        if joined.first == joined.starts[-1]:
            return torch.empty(0, dtype=torch.long, device=joined.ids.device)
        fresh = fresh_layers(joined, min(self.compared, len(joined.keys) - 1))
        for stored, computed in ((joined.keys[0], fresh[0].keys), (joined.values[0], fresh[0].values)):
            if not same_states(computed, stored):
                raise CakeError(
                    f"{self} moves documents by rotary positions, and what this model keeps of them in its first layer does "
                    "not follow."
                )
        places = self.chosen(joined, fresh)
        for number, layer in enumerate(fresh):
            joined.keys[number], joined.values[number] = layer.keys, layer.values
        return places


def turned(keys: torch.Tensor, offset: int, frequencies: torch.Tensor) -> torch.Tensor:
    """Returns keys at positions that are `offset` further on; dimensions without a position stay as they are."""
    if not offset:
        return keys
    half = frequencies.shape[0]
    angles = offset * frequencies.to(device=keys.device, dtype=torch.float64)
    cos, sin = angles.cos().float(), angles.sin().float()
    one, other, rest = keys.float().split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin, rest], dim=-1).to(keys.dtype)


class _Enough(Exception):
    """Ends a forward whose first layers are all that is wanted."""


class _Fresh(PressedLayer):
    """A layer of such a forward."""

    last = False

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().append(key_states, value_states)
        if self.last:
            raise _Enough


def fresh_layers(joined: Joined, last: int) -> list[PressedLayer]:
    """Computes the KV of all tokens behind the first document, of the layers up to `last` only."""
    layers = [
        _Fresh(key[:, :, : joined.first], value[:, :, : joined.first], joined.first)
        for key, value in zip(joined.keys, joined.values, strict=True)
    ]
    layers[last].last = True
    with contextlib.suppress(_Enough):
        _forward(joined, PressedCache(joined.model, [*layers]), torch.arange(joined.first, joined.starts[-1]))
    return [*layers[: last + 1]]


class _Scattered(PressedLayer):
    """A layer that puts the KV of a forward's tokens in the place of what it has of them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> None:
        super().__init__(keys, values, keys.shape[-2] - len(places))
        self.places = places

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = self.keys.index_copy(-2, self.places, key_states)
        self.values = self.values.index_copy(-2, self.places, value_states)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.keys.shape[-2], 0

    def attend(self, call: AttentionCall) -> Attended:
        """Computes attention of each token on all before it; if the tokens are the last ones, with the model's mask."""
        attention, query, keys, values, _ = call
        tokens = torch.arange(keys.shape[-2], device=keys.device)
        if torch.equal(self.places, tokens[-len(self.places) :]):
            return super().attend(call)
        hidden = torch.zeros((len(self.places), len(tokens)), dtype=query.dtype, device=keys.device)
        hidden.masked_fill_(tokens > self.places[:, None], torch.finfo(query.dtype).min)
        return attention(query, keys, values, hidden[None, None])


def recomputed(joined: Joined, places: torch.Tensor) -> list[PressedLayer]:
    """Computes the KV of some tokens with all documents in sight; returns all layers with it."""
    layers: list[PressedLayer] = [
        _Scattered(key, value, places) for key, value in zip(joined.keys, joined.values, strict=True)
    ]
    if len(places):
        _forward(joined, PressedCache(joined.model, layers), places)
    return [PressedLayer(layer.keys, layer.values, joined.starts[-1]) for layer in layers]


def _forward(joined: Joined, cache: PressedCache, places: torch.Tensor) -> None:
    model, places = joined.model, places.to(joined.ids.device)
    options = {"logits_to_keep": 1} if "logits_to_keep" in parameters_of(forward_of(model)) else {}
    with torch.no_grad():
        model(
            joined.ids[:, places],
            position_ids=places[None],
            attention_mask=torch.ones_like(joined.ids),
            **named_for(model, cache),
            **options,
        )


@dataclass(frozen=True)
class _Given(Press):
    """Layers as they are given, for measuring their error."""

    given: list[PressedLayer]

    def layers(self, prefix: Prefix) -> list[PressedLayer]:
        return self.given


def _error(joined: Joined, layers: list[PressedLayer]) -> float | None:
    """Returns the error of `PressReport`: against KV that is computed for the whole prompt."""
    model, full = joined.model, DynamicCache(config=joined.model.config)
    with torch.no_grad():
        model(joined.ids, attention_mask=torch.ones_like(joined.ids), **named_for(model, full))
    report = _Given(layers)(model, full, joined.ids).report
    return report.error if report is not None else None
