"""One call of a model's forward, seen as a prompt: its arguments, whether it can be cut into chunks, and the cutting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter
from typing import Any

import torch

from cake_hf.blocks import Block
from cake_hf.layers.compat import CACHE_NAMES, forward_parameters, named_for
from cake_hf.model.vision import Vision, look_at
from cake_hf.report import Refusal
from cake_hf.util.forks import cached_property

_UNDERSTOOD = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
}
"""Arguments whose meaning for a chunk is known. Any other argument that is set might change the KV."""

_OF_ALL_TOKENS = ("output_attentions", "output_hidden_states")
"""Arguments that ask for outputs beside the logits, which would then cover the suffix alone."""

_UNKNOWN_MASK = Refusal("mask", "the attention mask has a form of its own")


def understands(arguments: Mapping[str, Any]) -> bool:
    """Returns whether the meaning of all named arguments, except the cache, is known."""
    return all(value is None or name in _UNDERSTOOD or name in CACHE_NAMES for name, value in arguments.items())


@dataclass(frozen=True)
class ForwardCall:
    """The arguments of a forward by name.

    Attributes:
        arguments: as given by the caller, without the cache; positional ones are named.
        past: tokens in the cache before the call.
        cache: the cache, under the name by which the forward takes it.
        accepts: names of the forward's parameters.
        for_kv: the logits of the call are not used.
        wants_inner: the caller wants hidden states, or attentions, by an argument or by the model's config.
        vision: what the call of a vision-language model brings beside its ids; None for other models.
    """

    arguments: dict[str, Any]
    past: int
    cache: Mapping[str, Any] = field(repr=False)
    accepts: frozenset[str] = field(repr=False)
    for_kv: bool = False
    wants_inner: bool = False
    vision: Vision | None = field(default=None, repr=False)

    @classmethod
    def parse(
        cls,
        model: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: Any,
        past: int,
        *,
        for_kv: bool = False,
    ) -> ForwardCall:
        """Names the positional arguments, and separates the cache from the others."""
        parameters = forward_parameters(model)
        named = _named(parameters, args, kwargs)
        given_as = next((name for name, value in named.items() if value is cache), "")
        named = {name: value for name, value in named.items() if value is not cache}
        if named.get("mm_encoder_outputs") == {}:
            del named["mm_encoder_outputs"]  # `generate` has looked for images, and there are none
        accepts = frozenset(parameters)
        taken = named_for(model, cache, given_as)
        wants_inner = not for_kv and any(_is_wanted(model, named, name) for name in _OF_ALL_TOKENS)
        return cls(named, past, taken, accepts, for_kv, wants_inner, look_at(model, named, past, accepts))

    @cached_property
    def ids(self) -> torch.Tensor:
        """`[batch, tokens]`."""
        ids: torch.Tensor = self.arguments["input_ids"]
        return ids

    @cached_property
    def tokens(self) -> int:
        """The number of new tokens in this call; 0 if they are not given as ids."""
        ids = self.arguments.get("input_ids")
        return int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.ndim == 2 else 0

    @cached_property
    def is_batch(self) -> bool:
        """Whether the call brings several rows, or a single one with padding."""
        ids = self.arguments.get("input_ids")
        return isinstance(ids, torch.Tensor) and ids.ndim == 2 and (ids.shape[0] > 1 or self.is_padded)

    @cached_property
    def is_padded(self) -> bool:
        """Whether some of the call's tokens, or of those before them, are masked."""
        mask = self.arguments.get("attention_mask")
        return isinstance(mask, torch.Tensor) and not bool((mask == 1).all())

    @property
    def is_repeated(self) -> bool:
        """Whether a call that is not refused brings equal rows without padding."""
        return self.ids.shape[0] > 1 and bool(self._mask.all()) and bool((self.ids == self.ids[:1]).all())

    @property
    def lengths(self) -> list[int]:
        """For each row of a call that is not refused, the number of tokens that are not padding."""
        lengths: list[int] = self._mask.sum(dim=1).tolist()
        return lengths

    @property
    def wanted_logits(self) -> int:
        """The number of last tokens whose logits the caller wants, at least one; `refusal` checks what else it may want."""
        keep = self.arguments.get("logits_to_keep")
        return max(1, keep) if isinstance(keep, int) else 1

    @property
    def wants_all_logits(self) -> bool:
        """Whether the caller asks by number for the logits of every new token."""
        ids = self.arguments.get("input_ids")
        return isinstance(ids, torch.Tensor) and self.wanted_logits >= ids.shape[1]

    def refusal(self) -> Refusal | None:
        """Returns why this call must be left unchanged; None if it can be cut into chunks with the same result."""
        a = self.arguments
        ids, keep = a.get("input_ids"), a.get("logits_to_keep")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            return Refusal("no-token-ids", "the prompt is given as embeddings, not as token ids")
        if not self.for_kv and (not isinstance(keep, int) or keep < 1):
            return Refusal(
                "all-logits",
                "the caller wants the logits of all tokens; call cache.prefill(ids) before, or pass logits_to_keep=1",
            )
        if self.wants_inner:
            return Refusal(
                "hidden-states",
                "the caller wants hidden states, or attentions, of all tokens; prefill the cache for those of the last",
            )
        understood = _UNDERSTOOD if self.vision is None else _UNDERSTOOD | self.vision.understood
        if unknown := sorted(name for name, value in a.items() if name not in understood and value is not None):
            return Refusal("unknown-argument", f"the argument {unknown[0]!r} is not understood")
        if refusal := self._mask_refusal():
            return refusal
        if self.vision is not None and (refusal := self.vision.refusal(is_batch=self.is_batch)):
            return refusal
        numbered = self.vision is not None and not self.is_batch and self.vision.numbered
        if not numbered and not self._positions_are_plain():
            return Refusal("positions", "the positions are not those of a plain prompt")
        if torch.is_grad_enabled():
            return Refusal("gradients", "gradients are being recorded; call generate, or use torch.no_grad()")
        return None

    @property
    def begins_at_start(self) -> bool:
        """Whether the new tokens are numbered from 0, although others are in the cache."""
        ids, positions = self.arguments.get("input_ids"), self.arguments.get("position_ids")
        return (
            isinstance(positions, torch.Tensor)
            and positions.shape[-1:] == ids.shape[-1:]  # type: ignore[union-attr]  # positions come together with ids
            and positions.numel() > 0
            and int(positions.min()) == 0
        )

    def without_past(self) -> ForwardCall:
        """Returns the new part of a call that brings a whole prompt whose start is in the cache."""
        named = dict(self.arguments)
        for name in ("input_ids", "position_ids", "cache_position"):
            if isinstance(named.get(name), torch.Tensor):
                named[name] = named[name][..., self.past :].clone(memory_format=torch.contiguous_format)
        return replace(self, arguments=named)

    def after(self, tokens: int) -> ForwardCall:
        """Returns the call for what follows the first `tokens` of the new tokens, which are in the cache now."""
        return replace(replace(self, past=tokens).without_past(), past=self.past + tokens)

    def piece(self, start: int, end: int) -> dict[str, Any]:
        """Returns arguments for the new tokens `start` to `end` alone, as `generate(prefill_chunk_size=...)` would."""
        piece = dict(self.arguments)
        piece["input_ids"] = self.ids[:, start:end].clone(memory_format=torch.contiguous_format)
        for name in ("position_ids", "cache_position"):
            if piece.get(name) is not None:
                piece[name] = piece[name][..., start:end]
        if piece.get("attention_mask") is not None:
            piece["attention_mask"] = piece["attention_mask"][:, : self.past + end]
        if self.vision is not None:
            piece = self.vision.piece(piece, start, end)
        if "use_cache" in self.accepts or "use_cache" in piece:  # without it, a model may ignore the cache
            piece["use_cache"] = True
        return {**piece, **self.cache}

    def chunk(self, start: int, end: int) -> dict[str, Any]:
        """Returns the arguments of a forward that is run for its KV alone."""
        piece = self.piece(start, end)
        if "logits_to_keep" in self.accepts or "logits_to_keep" in piece:
            piece["logits_to_keep"] = 1
        return {**piece, "use_cache": True}

    def extra_hashes(self, named: Sequence[Block]) -> list[bytes]:
        """Returns the extra hash of each block, which its key covers beside tokens; an empty list if no block has any."""
        return [] if self.vision is None else self.vision.extra_hashes(named)

    def uncut(self, ends: Sequence[int]) -> int:
        """Returns the number (from 1) of the first of these places where the call must not be cut; 0 if there is none."""
        return 0 if self.vision is None else self.vision.uncut(ends)

    def _mask_refusal(self) -> Refusal | None:
        mask = self.arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            return _UNKNOWN_MASK
        if not self.is_batch:
            # Tokens for which a mask has no entry are masked, although none of its entries is 0.
            told = mask is None or (mask.shape[0] == 1 and mask.shape[1] >= self.past + self.tokens)
            return None if told else _UNKNOWN_MASK
        if self.past:
            return Refusal("batch-continues", "a batch, or a prompt with padding, goes on from what is in the cache")
        if mask is None:
            return None
        if mask.shape != self.ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
            return _UNKNOWN_MASK
        if bool((mask[:, :-1] > mask[:, 1:]).any()):
            return Refusal(
                "right-padding",
                "the attention mask has padding behind tokens, not only before them; pad on the left",
            )
        return None

    @cached_property
    def _mask(self) -> torch.Tensor:
        """Which of the new tokens are not padding: `[batch, tokens]`, on the device of the ids."""
        mask: torch.Tensor | None = self.arguments.get("attention_mask")
        if mask is None or not self.is_batch:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return mask.to(self.ids.device).bool()

    def _positions_are_plain(self) -> bool:
        """Returns whether each row's tokens are numbered from 0, not counting the padding."""
        positions, mask, places = self.arguments.get("position_ids"), self._mask, self.arguments.get("cache_position")
        counted = list(range(self.past, self.past + self.tokens))
        if places is not None and (not isinstance(places, torch.Tensor) or places.tolist() != counted):
            return False
        if positions is None:
            return bool(mask.all())
        if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.shape[1] != self.tokens:
            return False
        mask = mask.to(positions.device)
        plain = self.past + mask.cumsum(dim=1) - 1
        return bool(((positions == plain) | ~mask).all())


def _is_wanted(model: torch.nn.Module, arguments: Mapping[str, Any], name: str) -> bool:
    asked = arguments.get(name)
    return bool(getattr(model.config, name, False) if asked is None else asked)


def _named(parameters: Mapping[str, Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a call by name; arguments that it takes as `*args` get numbers, which no code understands."""
    names = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    names += [f"*{number}" for number in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}
