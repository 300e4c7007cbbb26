"""One call of a model's forward, seen as a prompt: what is in it, whether it can be cut into chunks, and the cutting."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

_UNDERSTOOD = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
}
"""Arguments whose meaning for a chunk is known. Any other one that is set might change the KV."""

_PASSED_THROUGH = {"return_dict", "use_cache"}
"""Arguments that transformers' decorators take where the forward itself does not name them."""

_LAST_CHUNK_ONLY = {"output_attentions", "output_hidden_states"}


@dataclass(frozen=True)
class ForwardCall:
    """The arguments of a forward by name.

    Attributes:
        arguments: as given by the caller, positional ones named.
        past: tokens in the cache before the call.
    """

    arguments: dict[str, Any]
    past: int
    accepts: frozenset[str] = field(repr=False)

    @classmethod
    def parse(cls, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], past: int) -> ForwardCall:
        """Name the positional arguments."""
        parameters = inspect.signature(model.forward).parameters
        named = dict(zip(parameters, args, strict=False))
        return cls({**named, **kwargs}, past, frozenset(parameters))

    @property
    def ids(self) -> torch.Tensor:
        """`[1, tokens]`."""
        ids: torch.Tensor = self.arguments["input_ids"]
        return ids

    @property
    def tokens(self) -> int:
        """New tokens in this call; 0 where they are not given as ids."""
        ids = self.arguments.get("input_ids")
        return int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.ndim == 2 else 0

    @property
    def wanted_logits(self) -> int:
        """Logits of how many last tokens the caller wants, at least one; what else it may want is for `refusal` to see."""
        keep = self.arguments.get("logits_to_keep")
        return max(1, keep) if isinstance(keep, int) else 1

    @property
    def wants_all_logits(self) -> bool:
        """Whether the caller asks by number for the logits of every new token."""
        ids = self.arguments.get("input_ids")
        return isinstance(ids, torch.Tensor) and self.wanted_logits >= ids.shape[1]

    def refusal(self) -> str:
        """Why this call must be left as it is; empty if it can be cut into chunks with the same result."""
        a = self.arguments
        ids, keep = a.get("input_ids"), a.get("logits_to_keep")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            return "the prompt is given as embeddings, not as token ids"
        if not isinstance(keep, int) or keep < 1:
            return "the caller wants the logits of all tokens"
        if ids.shape[0] != 1:
            return f"a batch of {ids.shape[0]} prompts cannot be restored yet"
        if unknown := sorted(name for name, value in a.items() if name not in _UNDERSTOOD and value is not None):
            return f"the argument {unknown[0]!r} is not understood"
        mask = a.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2 and bool((mask == 1).all())):
            return "the attention mask has padding or a form of its own"
        if not self._positions_are_plain():
            return "the positions are not those of a plain prompt"
        if torch.is_grad_enabled():
            return "gradients are being recorded; call generate, or use torch.no_grad()"
        return ""

    def piece(self, start: int, end: int) -> dict[str, Any]:
        """Arguments for the new tokens `start` to `end` alone, as `generate(prefill_chunk_size=...)` would give them."""
        piece = dict(self.arguments)
        piece["input_ids"] = self.ids[:, start:end].clone(memory_format=torch.contiguous_format)
        for name in ("position_ids", "cache_position"):
            if piece.get(name) is not None:
                piece[name] = piece[name][..., start:end]
        if piece.get("attention_mask") is not None:
            piece["attention_mask"] = piece["attention_mask"][:, : self.past + end]
        return piece

    def chunk(self, start: int, end: int) -> dict[str, Any]:
        """Arguments of a forward that is run for its KV alone."""
        piece = {name: value for name, value in self.piece(start, end).items() if name not in _LAST_CHUNK_ONLY}
        piece.update(use_cache=True, logits_to_keep=1)
        return {name: value for name, value in piece.items() if name in self.accepts or name in _PASSED_THROUGH}

    def _positions_are_plain(self) -> bool:
        positions = self.arguments.get("position_ids")
        if positions is None:
            return True
        plain = torch.arange(self.past, self.past + self.tokens, device=positions.device)
        return positions.ndim == 2 and torch.equal(positions.reshape(-1), plain)
