"""kvpress's presses on a restored prompt, through the same interface as ours. Nothing here imports kvpress."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from cake_hf.errors import CakeError
from cake_hf.layers.compat import find_cache
from cake_hf.model.foreign_code import reads_only
from cake_hf.presses.attention import attention_modules
from cake_hf.presses.cache import PressedCache
from cake_hf.presses.layers import PressedLayer
from cake_hf.presses.press import Prefix, Press, copied
from cake_hf.presses.window import record

SERVED = ("KeyDiffPress", "KnormPress", "LagKVPress", "SnapKVPress", "StreamingLLMPress", "ThinKPress")
"""Presses that look at keys, values and the last tokens alone; tests/test_kvpress.py runs each."""


@dataclass(frozen=True)
class FromKvpress(Press):
    """Applies a press of kvpress to each layer, as kvpress does after a prompt.

    A press that looks at hidden states gets those of the last tokens, which is all that the ones in `SERVED` use. With
    `ThinKPress` no memory is saved: it sets channels to zero.

    Args:
        press: of kvpress.

    Raises:
        CakeError: the press looks at more than a restore can bring.
    """

    press: Any
    needs_queries = True

    def __post_init__(self) -> None:
        if type(self.press).__name__ not in SERVED:
            raise CakeError(
                f"{type(self.press).__name__} may look at more than keys, values and the last tokens, which is all that a "
                f"restore brings."
            )

    def layers(self, prefix: Prefix) -> list[PressedLayer]:
        inputs, made = self._inputs(prefix), []
        for module, key, value in zip(attention_modules(prefix.model), prefix.keys, prefix.values, strict=True):
            given = inputs[module.layer_idx]
            with torch.no_grad():
                kept = self.press.compress(module, given["hidden_states"], key.clone(), value, None, given)
            made.append(PressedLayer(copied(kept[0]), copied(kept[1]), prefix.tokens))
        return made

    def _inputs(self, prefix: Prefix) -> dict[int, dict[str, Any]]:
        """Returns by layer what its attention got for the last tokens."""
        found: dict[int, dict[str, Any]] = {}
        thread = threading.get_ident()

        @reads_only
        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = find_cache((*kwargs.values(), *args), PressedCache)
            if threading.get_ident() == thread and cache is not None:
                found[module.layer_idx] = {"hidden_states": args[0], **kwargs} if args else kwargs

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in attention_modules(prefix.model)]
        try:
            assert prefix.ids is not None
            window = getattr(self.press, "window_size", 0) + 1  # SnapKVPress asks for one token more
            record(prefix.model, prefix.keys, prefix.values, prefix.ids, window)
        finally:
            for hook in hooks:
                hook.remove()
        return found
