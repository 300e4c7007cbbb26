"""Deferred encoding of a prompt's images: an image stays pixels until its features are needed.

`generate` of transformers runs the vision part on all images before the cache sees the prompt. For a prompt whose images are
restored, that work would be wasted. So while a model has a `CakeCache`, `generate` passes on the pixels instead
(`ImageDeferral`), in an object that behaves like the vision part's output.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from cake_hf.chunks.aligned_memory import host_bytes
from cake_hf.util.forks import cached_property

_INPUTS = ("pixel_values", "image_grid_thw")
_PREPARE = "_maybe_prepare_encoder_kwargs_for_generation"
"""The step in which `generate` runs the vision part; versions without it pass the pixels to the forward."""


@dataclass(frozen=True)
class Features:
    """The vision part's features of images, token by token.

    Attributes:
        pooled: `[tokens, hidden]`.
        deep: the same from some inner layers, if the model has such features; else None.
        kind: the class of the vision part's output.
        as_tensor: whether its features are a tensor `[images, tokens, hidden]`, not a list with a tensor per image.
    """

    pooled: torch.Tensor
    deep: tuple[torch.Tensor, ...] | None
    kind: type[Any]
    as_tensor: bool

    @classmethod
    def of(cls, output: Any) -> Features:
        """Creates features from an output of the vision part."""
        pooled, deep = output.pooler_output, getattr(output, "deepstack_features", None)
        flat = None if deep is None else tuple(_flat(level) for level in deep)
        return cls(_flat(pooled), flat, type(output), isinstance(pooled, torch.Tensor))

    @classmethod
    def join(cls, several: Sequence[Features]) -> Features:
        """Concatenates features in the given order."""
        levels = zip(*(features.deep or () for features in several), strict=True)
        deep = None if several[0].deep is None else tuple(torch.cat(level) for level in levels)
        return replace(several[0], pooled=torch.cat([features.pooled for features in several]), deep=deep)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return int(self.pooled.shape[0])

    def rows(self, start: int, end: int) -> Features:
        """Returns the features of tokens `start` to `end` only."""
        deep = None if self.deep is None else tuple(level[start:end] for level in self.deep)
        return replace(self, pooled=self.pooled[start:end], deep=deep)

    def output(self) -> Any:
        """Returns the features in the form that a forward takes."""
        named: dict[str, Any] = {"pooler_output": self.pooled.unsqueeze(0) if self.as_tensor else [self.pooled]}
        if self.deep is not None:
            named["deepstack_features"] = [[level] for level in self.deep]
        return self.kind(**named)


class UnreadImages:
    """A placeholder for the vision part's output on all images of a prompt. The output is computed on first access.

    Args:
        model: the model with the vision part.
        inputs: `pixel_values` and, for models that take it, `image_grid_thw`.
    """

    def __init__(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        self._model = model
        self._inputs = inputs

    @classmethod
    def of(cls, model: torch.nn.Module, given: dict[str, Any]) -> UnreadImages:
        """Creates the placeholder from the images among a call's arguments."""
        return cls(model, {name: given[name] for name in _INPUTS if given.get(name) is not None})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._whole, name)

    def __getitem__(self, name: Any) -> Any:
        return self._whole[name]

    def well_formed(self, *, by_grid: bool) -> bool:
        """Returns whether `one` can tell the images apart."""
        pixels, grid = self._inputs["pixel_values"], self._inputs.get("image_grid_thw")
        if not by_grid:
            return grid is None and pixels.ndim == 4 and pixels.shape[0] > 0
        if not isinstance(grid, torch.Tensor) or grid.ndim != 2 or grid.shape[1] != 3 or pixels.ndim != 2:
            return False
        return bool((grid > 0).all()) and self._rows[-1] == pixels.shape[0]

    def token_counts(self, merged_patches: int, places: int) -> list[int]:
        """Returns the number of tokens of each image.

        Args:
            merged_patches: the number of patches per token; 0 if all images are equal in size.
            places: the number of the prompt's placeholder tokens for images.
        """
        if merged_patches:
            return [(end - start) // merged_patches for start, end in zip(self._rows, self._rows[1:], strict=False)]
        images = self._inputs["pixel_values"].shape[0]
        return [places // images] * images

    def one(self, number: int, *, by_grid: bool) -> dict[str, torch.Tensor]:
        """Returns the vision part's inputs for that image only."""
        pixels = self._inputs["pixel_values"]
        if not by_grid:
            return {"pixel_values": pixels[number : number + 1]}
        rows = slice(self._rows[number], self._rows[number + 1])
        return {"pixel_values": pixels[rows], "image_grid_thw": self._inputs["image_grid_thw"][number : number + 1]}

    def embed(self, number: int, *, by_grid: bool) -> Features:
        """Runs the vision part on that image only."""
        return Features.of(self._run(self.one(number, by_grid=by_grid)))

    @cached_property
    def _rows(self) -> list[int]:
        """The index of each image's first patch, and the end of the last image."""
        return list(accumulate(self._inputs["image_grid_thw"].prod(dim=-1).tolist(), initial=0))

    @cached_property
    def _whole(self) -> Any:
        return self._run(self._inputs)

    def _run(self, inputs: dict[str, torch.Tensor]) -> Any:
        base: Any = self._model.base_model
        return base.get_image_features(**inputs, return_dict=True)


class ImageDeferral:
    """While it is installed, `generate` passes on pixels if the call has one of our caches and the images can be split.

    Args:
        model: any model.
        is_wanted: returns, from the forward's arguments, whether one of our caches will see the forward.
    """

    def __init__(self, model: torch.nn.Module, is_wanted: Callable[[dict[str, Any]], bool]) -> None:
        self._attributes = vars(model)
        if hasattr(type(model), _PREPARE) and (self._is_ours() or _PREPARE not in self._attributes):
            self._attributes[_PREPARE] = partial(_prepare, model, is_wanted)

    def remove(self) -> None:
        """Restores the model's own method."""
        if self._is_ours():
            del self._attributes[_PREPARE]

    def _is_ours(self) -> bool:
        """Returns whether the deferral is installed: by this object, or by copying a model that had it."""
        return getattr(self._attributes.get(_PREPARE), "func", None) is _prepare


def digest_of(inputs: dict[str, torch.Tensor]) -> bytes:
    """Returns a digest of named tensors' content; the same on every device and in every process."""
    digest = hashlib.blake2b(digest_size=20, person=b"cake-image")
    for name, tensor in sorted(inputs.items()):
        content = host_bytes(tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(content)
    return digest.digest()


def _flat(features: Any) -> torch.Tensor:
    """Returns `[tokens, hidden]` of all images, from one tensor or a list with a tensor per image."""
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in features])


def _prepare(model: torch.nn.Module, is_wanted: Callable[[dict[str, Any]], bool], *args: Any, **kwargs: Any) -> Any:
    original = getattr(type(model), _PREPARE)
    given = inspect.signature(original).bind(model, *args, **kwargs).arguments
    model_kwargs: dict[str, Any] = given.get("model_kwargs") or {}
    if not _is_single_prompt(given) or not _has_images_alone(model, model_kwargs) or not is_wanted(model_kwargs):
        return original(model, *args, **kwargs)
    images = UnreadImages.of(model, model_kwargs)
    for name in _INPUTS:
        model_kwargs.pop(name, None)
    prepared = original(model, *args, **kwargs)
    prepared.setdefault("mm_encoder_outputs", {})["image"] = images
    return prepared


def _is_single_prompt(given: dict[str, Any]) -> bool:
    """Returns whether `generate` neither repeats nor splits the prompt itself, which would access the images."""
    inputs, config = given.get("inputs_tensor"), given.get("generation_config")
    if not isinstance(inputs, torch.Tensor) or inputs.shape[0] != 1 or config is None:
        return False
    rows = max(getattr(config, "num_beams", None) or 1, getattr(config, "num_return_sequences", None) or 1)
    return rows == 1 and getattr(config, "prefill_chunk_size", None) is None


def _has_images_alone(model: torch.nn.Module, model_kwargs: dict[str, Any]) -> bool:
    """Returns whether the call has images, none of them encoded, and no other input for the vision part."""
    base: Any = getattr(model, "base_model", model)
    takes = getattr(base, "get_image_features", None)
    if takes is None or "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return False
    others = set(inspect.signature(takes).parameters) - set(_INPUTS) - {"kwargs"}
    others |= {"pixel_values_videos", "mm_encoder_outputs"}
    alone = all(model_kwargs.get(name) is None or model_kwargs[name] == {} for name in others)
    return alone and isinstance(model_kwargs.get("pixel_values"), torch.Tensor)
