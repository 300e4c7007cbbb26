"""Inputs of a vision-language model beside its token ids: images behind placeholder tokens, and what depends on them.

The KV of a chunk then depends on more than its tokens: on the pixels of its images, on the positions of its tokens (Qwen
numbers an image's tokens in three dimensions, and all later tokens accordingly), and on which of them attend to each other in
both directions. An extra hash covers all of that, and goes into the chunk's key. Chunks before an image have the keys of plain
text.

The model's vision part runs on each image separately, and only if one of its tokens is to be computed. Several images at once
would round differently, and an image's features must not depend on the other images of the prompt.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from cake_hf.blocks import Block
from cake_hf.errors import UnfitImages
from cake_hf.model.images import Features, UnreadImages, digest_of
from cake_hf.report import Refusal
from cake_hf.util.forks import cached_property


@dataclass(frozen=True)
class VisionFamily:
    """The way in which the models of one type take images.

    Attributes:
        by_grid: the patches of all images are rows of one tensor, and a grid assigns them to images; otherwise all images are
            equal in size, and each image is an entry.
        numbers: the positions of tokens depend on the images, and on `mm_token_type_ids`, which have no other use.
        types: the argument that says which tokens belong to an image, if these attend to each other in both directions when it
            is given. Then an image must not be cut.
    """

    by_grid: bool = False
    numbers: bool = False
    types: str = ""


_QWEN = VisionFamily(by_grid=True, numbers=True)

FAMILIES = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "gemma3": VisionFamily(types="token_type_ids"),
    "llava": VisionFamily(),
    "internvl": VisionFamily(),
}
"""By `config.model_type`. For other models, prompts with images are computed plainly."""


def family_of(model: torch.nn.Module) -> VisionFamily | None:
    """Returns the way in which a model takes images; None if it is unknown, or the model takes none."""
    return FAMILIES.get(str(getattr(model.config, "model_type", "")))


def look_at(model: torch.nn.Module, arguments: dict[str, Any], past: int, accepts: frozenset[str]) -> Vision | None:
    """Returns a call's inputs beside its ids; None if the model belongs to no known family, or the call has no ids.

    Args:
        model: the model whose forward is called.
        arguments: the arguments of the forward, by name.
        past: the number of tokens in the cache before the call.
        accepts: names of the forward's arguments.
    """
    family, ids = family_of(model), arguments.get("input_ids")
    if family is None or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    return Vision(model, family, arguments, past, sliceable="mm_encoder_outputs" in accepts)


def numbering_refusal(model: torch.nn.Module, arguments: dict[str, Any]) -> Refusal | None:
    """Returns why a call cannot be cut, if its tokens' positions would depend on the model's previous prompt; else None."""
    # Such models keep the shift by images as an attribute; without positions they add it from a prompt's second piece on.
    kept = getattr(getattr(model, "base_model", model), "rope_deltas", None)
    if kept is None or arguments.get("position_ids") is not None:
        return None
    return Refusal(
        "stale-positions",
        "the model would number the tokens by the prompt it had before; call generate, or give position_ids",
    )


def forget_numbering(model: torch.nn.Module) -> None:
    """Drops the position shift that a model keeps of its last prompt, at the start of a prompt outside `generate`."""
    base = getattr(model, "base_model", model)
    if getattr(base, "rope_deltas", None) is not None:
        base.rope_deltas = None


class Vision:
    """The inputs of one call of a vision-language model beside its token ids; everything is evaluated on first use.

    Args:
        model: the model whose forward is called.
        arguments: the arguments of the forward, by name, with `input_ids`.
        past: the number of tokens in the cache before the call.
        sliceable: whether the forward takes the vision part's features, so that a piece can contain a part of an image.
    """

    def __init__(
        self, model: torch.nn.Module, family: VisionFamily, arguments: dict[str, Any], past: int, *, sliceable: bool
    ) -> None:
        self._model = model
        self._config: Any = model.config
        self._family = family
        self._arguments = arguments
        self._past = past
        self._sliceable = sliceable
        self._tokens = int(arguments["input_ids"].shape[1])
        self._read: dict[int, Features] = {}

    @property
    def understood(self) -> frozenset[str]:
        """Names of the arguments that the extra hashes cover, or that `refusal` checks."""
        names = {"mm_encoder_outputs", "pixel_values", self._family.types}
        names |= {"image_grid_thw"} if self._family.by_grid else set()
        names |= {"mm_token_type_ids"} if self._family.numbers else set()
        return frozenset(names) - {""}

    @cached_property
    def numbered(self) -> bool:
        """Whether the call has positions in several dimensions, which the extra hashes cover."""
        positions = self._arguments.get("position_ids")
        if not self._family.numbers or not isinstance(positions, torch.Tensor) or positions.ndim != 3:
            return False
        if positions.shape[0] not in (1, 3, 4) or tuple(positions.shape[1:]) != (1, self._tokens):
            return False
        # The first of four dimensions is for masks, and counts tokens.
        return positions.shape[0] < 4 or torch.equal(positions[0, 0].cpu().long(), self._plain)

    def refusal(self, *, is_batch: bool) -> Refusal | None:
        """Returns why the call must not be cut, as far as images are concerned; None if it can be cut.

        Args:
            is_batch: whether it has several rows, or padding.
        """
        types = self._types
        if is_batch:
            if self._images is None and not self._features_given and types is None:
                return None
            return Refusal("image-batch", "a batch with images, or with types of tokens, is computed as it comes")
        if self._features_given:
            return Refusal("image-features", "images, or videos, are given as features, not as pixels")
        if types is not None and tuple(types.shape) != (1, self._past + self._tokens):
            return Refusal(
                "token-types",
                f"the argument {self._family.types!r} does not have a number for each token from the prompt's start on",
            )
        if self._is_cut(0):
            return Refusal(
                "starts-in-image",
                "the prompt goes on within an image, whose tokens see each other in both directions",
            )
        return self._images_refusal()

    def uncut(self, ends: Sequence[int]) -> int:
        """Returns the number (from 1) of the first of these places that is inside an image that must not be cut; 0 if none."""
        return next((number for number, end in enumerate(ends, 1) if self._is_cut(end)), 0)

    def extra_hashes(self, named: Sequence[Block]) -> list[bytes]:
        """Returns the extra hash of each block: a digest of all that affects its KV beside tokens; empty if nothing does."""
        return [self._extra_hash(block.start, block.end) for block in named]

    def piece(self, piece: dict[str, Any], start: int, end: int) -> dict[str, Any]:
        """Returns the arguments of a piece of the call, with the features of the images that it needs, and of no others.

        Args:
            piece: the arguments of the new tokens `start` to `end`, except images and token types.
            start: the piece's first token.
            end: the token after its last one.

        Raises:
            UnfitImages: the vision part's number of tokens differs from the prompt's number of placeholders.
        """
        piece = {name: value for name, value in piece.items() if name not in self.understood}
        if self._types is not None:  # masks are built from all types from the start of the prompt on
            piece[self._family.types] = self._types[:, : self._past + end]
        if embedded := self._embedded(start, end):
            piece["mm_encoder_outputs"] = {"image": Features.join(embedded).output()}
        return piece

    # The assignment of tokens to images.

    @cached_property
    def _images(self) -> UnreadImages | None:
        """The call's images, not yet encoded by the vision part; None if there are none."""
        given = self._given_outputs.get("image")
        if isinstance(given, UnreadImages):
            return given
        has_pixels = isinstance(self._arguments.get("pixel_values"), torch.Tensor)
        return UnreadImages.of(self._model, self._arguments) if has_pixels else None

    @property
    def _given_outputs(self) -> dict[str, Any]:
        outputs = self._arguments.get("mm_encoder_outputs") or {}
        return {name: output for name, output in outputs.items() if output is not None}

    @property
    def _features_given(self) -> bool:
        return any(
            name != "image" or not isinstance(output, UnreadImages) for name, output in self._given_outputs.items()
        )

    @property
    def _types(self) -> torch.Tensor | None:
        types = self._arguments.get(self._family.types) if self._family.types else None
        return types if isinstance(types, torch.Tensor) else None

    @cached_property
    def _plain(self) -> torch.Tensor:
        return torch.arange(self._past, self._past + self._tokens)

    @cached_property
    def _places(self) -> list[int]:
        """The indices of the new tokens that are placeholders for images, in order."""
        ids = self._arguments["input_ids"][0]
        places: list[int] = (ids == self._config.image_token_id).nonzero()[:, 0].tolist()
        return places

    @cached_property
    def _bounds(self) -> list[int]:
        """The index in `_places` of each image's start, and the end of the last image."""
        counts = [] if self._images is None else self._images.token_counts(self._merged_patches, len(self._places))
        return list(accumulate(counts, initial=0))

    @property
    def _merged_patches(self) -> int:
        """The number of patches per token, if a grid gives each image's number of patches; otherwise 0."""
        return int(self._config.vision_config.spatial_merge_size) ** 2 if self._family.by_grid else 0

    def _images_refusal(self) -> Refusal | None:
        if self._images is None:
            if not self._places:
                return None
            return Refusal("images-missing", "the prompt has places for images, but no images come with it")
        if not self._sliceable:
            return Refusal("image-parts", "this version of transformers cannot be given a part of an image")
        if not self._images.well_formed(by_grid=self._family.by_grid):
            return Refusal("image-form", "the images have a form that is not understood")
        if self._bounds[-1] != len(self._places) or len(set(self._bounds)) < len(self._bounds):
            return Refusal("image-tokens", "the prompt's places for images are not as many as its images have tokens")
        if self._family.numbers and self._arguments.get("position_ids") is None:
            return Refusal(
                "image-positions",
                "the positions of tokens follow from the images; call generate, or give position_ids",
            )
        return None

    def _is_cut(self, place: int) -> bool:
        """Returns whether an image that must not be cut extends across the border before that new token."""
        at = self._past + place
        return 0 < at < len(self._tied) and self._tied[at - 1] and self._tied[at]

    @cached_property
    def _tied(self) -> list[bool]:
        """For each token of the prompt, whether it belongs to an image that must not be cut; empty if there are none."""
        if self._types is None:
            return []
        tied: list[bool] = (self._types[0] == 1).tolist()
        return tied

    # Extra hashes.

    @cached_property
    def _planes(self) -> torch.Tensor:
        """The positions in each dimension, `[3, tokens]`."""
        if not self.numbered:
            return self._plain.expand(3, -1)
        positions: torch.Tensor = self._arguments["position_ids"][:, 0].cpu().long()
        return positions[-3:] if positions.shape[0] > 1 else positions.expand(3, -1)

    def _extra_hash(self, start: int, end: int) -> bytes:
        parts: list[bytes] = []
        planes = self._planes[:, start:end]
        if not bool((planes == self._plain[start:end]).all()):
            parts += [b"positions", planes.contiguous().numpy().tobytes()]
        if self._types is not None:
            parts += [b"types", self._types[0, self._past + start : self._past + end].cpu().long().numpy().tobytes()]
        for number in self._begun_in(start, end):
            where = self._places[self._bounds[number]] - start
            count = self._bounds[number + 1] - self._bounds[number]
            parts += [b"image", f"{where} {count}".encode(), self._image_digest(number)]
        return _digest(parts)

    def _begun_in(self, start: int, end: int) -> list[int]:
        """Returns the images whose first token is in that range. Keys of earlier chunks cover images that started earlier."""
        firsts = [self._places[bound] for bound in self._bounds[:-1]]
        return [number for number, first in enumerate(firsts) if start <= first < end]

    def _image_digest(self, number: int) -> bytes:
        assert self._images is not None
        return digest_of(self._images.one(number, by_grid=self._family.by_grid))

    # Features of the images.

    def _embedded(self, start: int, end: int) -> list[Features]:
        """Returns, for each image with tokens in that range, the features of these tokens."""
        found = []
        for number, (first, last) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
            begin, stop = (bisect_left(self._places, border, first, last) for border in (start, end))
            if begin < stop:
                found.append(self._features(number).rows(begin - first, stop - first))
        return found

    def _features(self, number: int) -> Features:
        if number not in self._read:
            assert self._images is not None
            features = self._images.embed(number, by_grid=self._family.by_grid)
            places = self._bounds[number + 1] - self._bounds[number]
            if features.tokens != places:
                raise UnfitImages(
                    f"Image {number} of the prompt is {features.tokens} tokens for the model, but the prompt has {places} "
                    "places for it; make ids and images with the model's own processor."
                )
            self._read[number] = features
        return self._read[number]


def _digest(parts: Sequence[bytes]) -> bytes:
    if not parts:
        return b""
    digest = hashlib.blake2b(digest_size=20, person=b"cake-mark")
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
