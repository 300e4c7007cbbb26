"""KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing (Yang et al., 2024, arXiv 2410.18517)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from transformers import DynamicCache

from cake_hf.errors import CakeError
from cake_hf.layers.compat import named_for
from cake_hf.model.look import home_device
from cake_hf.presses.cache import PressedCache
from cake_hf.presses.layers import PressedLayer
from cake_hf.presses.press import Prefix, Press, check_share, taken


@dataclass(frozen=True)
class KVSharer(Press):
    """Some layers use the KV of an earlier layer and keep none of their own, of the prefix and of later tokens.

    `calibrated` finds the layers (algorithm 1 of the paper): pairs are tried from the most dissimilar on, by the Euclidean
    distance of their mean keys and values; a pair is taken if the model's last hidden states on the calibration texts stay
    similar. Memory: the KV of each layer that shares is saved.
    Other than in the paper, what a layer keeps of the prefix was computed without sharing, as it was stored.

    Args:
        shared: pairs of a layer and the earlier one whose KV it uses. With none the output is bit for bit that of the full
            cache.
    """

    shared: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        layers = [layer for layer, _ in self.shared]
        for layer, source in self.shared:
            if not 0 <= source < layer or source in layers or layers.count(layer) > 1:
                raise ValueError(f"Layer {layer} cannot share the KV of layer {source} in {self.shared!r}.")

    @classmethod
    def calibrated(
        cls, model: torch.nn.Module, texts: Sequence[torch.Tensor], share: float = 0.25, threshold: float = 0.5
    ) -> KVSharer:
        """Finds the layers that share on calibration texts.

        Args:
            model: the model.
            texts: token ids `[1, tokens]` each; of longer ones only as many tokens are used as the shortest has.
            share: of the layers that are to share; fewer if the threshold does not allow as many.
            threshold: cosine similarity of the last hidden states, of the model with sharing and without, that has to be
                exceeded.
        """
        check_share("share", share)
        if not texts:
            raise ValueError("KVSharer needs at least one calibration text.")
        shortest = min(one.shape[1] for one in texts)
        texts = [text[:, :shortest].to(home_device(model)) for text in texts]
        found = [_seen(model, text) for text in texts]
        hidden = torch.cat([states for _, states in found]).flatten(1)
        prefixes = [prefix for prefix, _ in found]
        wanted = int(len(prefixes[0].keys) * share)
        shared: dict[int, int] = {}
        for source, layer in _by_distance(prefixes):
            if len(shared) == wanted:
                break
            if layer in shared:
                continue
            trial = {**shared, layer: source}
            trial = {one: trial.get(other, other) for one, other in sorted(trial.items())}
            pairs = tuple(trial.items())
            changed = torch.cat(
                [_run(model, text, PressedCache(model, cls(pairs).layers(_empty(prefixes[0])))) for text in texts]
            )
            if torch.cosine_similarity(changed.flatten(1), hidden, dim=-1).mean() > threshold:
                shared = trial
        return cls(tuple(sorted(shared.items())))

    def layers(self, prefix: Prefix) -> list[PressedLayer]:
        source, layers = dict(self.shared), list[PressedLayer]()
        if self.shared and max(source) >= len(prefix.keys):
            raise CakeError(f"KVSharer shares layer {max(source)}, and this model has {len(prefix.keys)} layers.")
        for number in range(len(prefix.keys)):
            plain = prefix.plain_layer(number)
            if number in source and plain.keys.shape != layers[source[number]].keys.shape:
                raise CakeError(f"KVSharer is made for layers alike, and layers {number} and {source[number]} are not.")
            layers.append(SharingLayer(layers[source[number]]) if number in source else plain)
        return layers


class SharingLayer(PressedLayer):
    """Uses the keys and values of an earlier layer.

    Args:
        source: that layer.
    """

    def __init__(self, source: PressedLayer) -> None:
        super().__init__(source.keys, source.values, source.seen)
        self.source = source

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = self.source.keys, self.source.values


def _seen(model: Any, text: torch.Tensor) -> tuple[Prefix, torch.Tensor]:
    """Returns a text's KV, and its last hidden states."""
    cache = DynamicCache(config=model.config)
    hidden = _run(model, text, cache)
    return taken(model, cache, text, "KVSharer"), hidden


def _run(model: Any, text: torch.Tensor, cache: Any) -> torch.Tensor:
    """Returns a text's last hidden states with this cache, which is empty."""
    with torch.no_grad():
        output = model(text, attention_mask=torch.ones_like(text), output_hidden_states=True, **named_for(model, cache))
    return output.hidden_states[-1].float()  # type: ignore[no-any-return]


def _empty(prefix: Prefix) -> Prefix:
    """Returns a prefix of no tokens."""
    keys, values = ([states[:, :, :0] for states in one] for one in (prefix.keys, prefix.values))
    return Prefix(prefix.model, keys, values, None, [])


def _by_distance(prefixes: list[Prefix]) -> list[tuple[int, int]]:
    """Returns pairs of an earlier and a later layer, the most dissimilar first."""

    def flat(number: int) -> torch.Tensor:
        return torch.stack(
            [torch.cat([one.keys[number].flatten(), one.values[number].flatten()]).float() for one in prefixes]
        ).mean(dim=0)

    means = [flat(number) for number in range(len(prefixes[0].keys))]
    pairs = [
        (one, other) for one, other in combinations(range(len(means)), 2) if means[one].shape == means[other].shape
    ]
    return sorted(pairs, key=lambda pair: -float((means[pair[0]] - means[pair[1]]).norm()))
