"""Documents whose KV was stored alone, put one behind the other: what CacheBlend and EPIC have in common.

    documents = (restored(ids) for ids in parts)  # a `CakeCache` for each, after `prefill(ids)`
    small = CacheBlend(ratio=0.15)(model, documents)
    model.generate(torch.cat([*parts, question], dim=1), cache=small)

The KV of all documents but the first is wrong there in two ways. Its keys have the positions of a document that starts at 0:
they are turned on by the rotary embedding, `R(p + offset) k = R(offset) R(p) k`. And it knows nothing of the documents before
it: a method chooses tokens, whose KV is computed again, with those documents in sight. While that happens, the next document
loads.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from transformers import Cache, DynamicCache

from cake_hf.errors import CakeError
from cake_hf.layers.compat import forward_parameters, named_for
from cake_hf.presses.attention import Attended, AttentionCall
from cake_hf.presses.cache import PressedCache, PressReport, nbytes
from cake_hf.presses.layers import PressedLayer
from cake_hf.presses.press import Prefix, error_of, taken, with_window
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
    """The documents so far, one behind the other.

    Attributes:
        model: the model.
        keys, values: of each layer, `[1, heads, tokens, head_dim]`, keys with their new positions.
        ids: `[1, tokens]`.
        start: where the last document starts.
    """

    model: Any
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    ids: torch.Tensor
    start: int = 0

    def add(self, document: Prefix, frequencies: torch.Tensor) -> None:
        """Puts a document behind the others; `frequencies` are those of the rotary embedding."""
        assert document.ids is not None
        self.start = self.ids.shape[1]
        self.keys = _behind(self.keys, [turned(one, self.start, frequencies) for one in document.keys])
        self.values = _behind(self.values, document.values)
        self.ids = torch.cat([self.ids, document.ids.to(self.ids.device)], dim=1)

    @property
    def places(self) -> torch.Tensor:
        """The places of the last document's tokens."""
        return torch.arange(self.start, self.ids.shape[1], device=self.ids.device)


def _behind(states: list[torch.Tensor], others: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat(pair, dim=-2) for pair in zip(states, others, strict=True)]


class Blend:
    """The base of both methods. A subclass defines `chosen`."""

    compared = 0
    """The last layer in which the method compares stored KV with what the model computes."""

    def __call__(
        self,
        model: torch.nn.Module,
        documents: Iterable[Cache],
        ids: Sequence[torch.Tensor] | None = None,
        *,
        measure: bool = True,
    ) -> PressedCache:
        """Returns a cache of all documents, in this order; its `report` is a `BlendReport`.

        Args:
            model: the model whose KV the caches hold.
            documents: a cache for each, as a `Press` takes it, with positions from 0; they are not changed. Each is taken in
                another thread while tokens of the one before are computed again, so a generator restores it meanwhile.
            ids: the token ids of each, `[1, tokens]`; a `CakeCache` after `prefill` knows them.
            measure: also measure the error, for which the whole prompt is computed once.

        Raises:
            CakeError: as for a `Press`; or the model does not give tokens their positions by rotary embedding.
        """
        started, again = time.monotonic(), 0
        joined: Joined | None = None
        for document, own in zip_longest(_one_ahead(documents), ids if ids is not None else ()):
            if document is None or (own is None and ids is not None):
                raise CakeError("Each document has its token ids, and there are not as many documents as ids.")
            prefix = taken(model, document, own, str(self))
            if prefix.ids is None:
                raise CakeError(f"{self} computes tokens again: pass the token ids of all documents as ids=...")
            if joined is None:
                joined = Joined(model, prefix.keys, prefix.values, prefix.ids.to(prefix.keys[0].device))
            else:
                joined.add(prefix, _frequencies(model, str(self)))
                again += self._computed_again(joined)
        if joined is None:
            raise CakeError(f"{self} needs at least one document.")
        tokens, size = joined.ids.shape[1], nbytes([*joined.keys, *joined.values])
        layers = [PressedLayer(key, value, tokens) for key, value in zip(joined.keys, joined.values, strict=True)]
        seconds = time.monotonic() - started
        error = _error(joined, layers, str(self)) if measure else None
        report = BlendReport(str(self), tokens, [tokens] * len(layers), size, size, error, seconds, again)
        return PressedCache(model, layers, report)

    def chosen(self, joined: Joined, fresh: list[PressedLayer]) -> torch.Tensor:
        """Returns which tokens of the last document are computed again, in their order.

        Args:
            joined: the documents so far.
            fresh: the layers up to `compared`, with KV as the model computes it for all of them.
        """
        raise NotImplementedError

    def _computed_again(self, joined: Joined) -> int:
        """Computes tokens of the last document again; returns how many."""
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
        compute_again(joined, places)
        return len(places)


def _one_ahead(documents: Iterable[Cache]) -> Iterator[Cache]:
    """Yields documents; the next one is taken in another thread while one is in use."""
    rest = iter(documents)
    with ThreadPoolExecutor(1, "cake-documents") as pool:
        coming = pool.submit(next, rest, None)
        while (document := coming.result()) is not None:
            coming = pool.submit(next, rest, None)
            yield document


def _frequencies(model: torch.nn.Module, method: str) -> torch.Tensor:
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            return buffer
    raise CakeError(f"{method} is made for rotary positions, and this model has none.")


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
    """Computes the KV of the last document, of the layers up to `last` only; returns them with all documents."""
    layers = [
        _Fresh(key[:, :, : joined.start], value[:, :, : joined.start], joined.start)
        for key, value in zip(joined.keys, joined.values, strict=True)
    ]
    layers[last].last = True
    with contextlib.suppress(_Enough):
        _forward(joined, PressedCache(joined.model, [*layers]), joined.places)
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


def compute_again(joined: Joined, places: torch.Tensor) -> None:
    """Computes the KV of some tokens with all documents in sight, and puts it in place of what is there."""
    if not len(places):
        return
    layers = [_Scattered(key, value, places) for key, value in zip(joined.keys, joined.values, strict=True)]
    _forward(joined, PressedCache(joined.model, [*layers]), places)
    joined.keys, joined.values = [layer.keys for layer in layers], [layer.values for layer in layers]


def _forward(joined: Joined, cache: PressedCache, places: torch.Tensor) -> None:
    model = joined.model
    options = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
    with torch.no_grad():
        model(
            joined.ids[:, places],
            position_ids=places[None],
            attention_mask=torch.ones_like(joined.ids),
            **named_for(model, cache),
            **options,
        )


def _error(joined: Joined, layers: list[PressedLayer], method: str) -> float | None:
    """Returns the error of `PressReport`: against KV that is computed for the whole prompt."""
    model, full = joined.model, DynamicCache(config=joined.model.config)
    with torch.no_grad():
        model(joined.ids, attention_mask=torch.ones_like(joined.ids), **named_for(model, full))
    return error_of(with_window(taken(model, full, joined.ids, method)), layers)
