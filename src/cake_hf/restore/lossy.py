"""The canonical lossy schedule: a full chunk goes through the cache's codec before anything behind it sees its KV.

So a computed chunk becomes, in the cache, exactly what a chunk that is loaded decodes to, and the output does not depend on
what was stored, or on whether anything is saved. These stay exact: the first chunk of a prompt, which later tokens attend to
most; tails before declared cuts, decoded tokens, and the suffix unless it is a full chunk: the recent part of a prompt; sliding
windows and recurrent states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from cake_hf.blocks import Block
from cake_hf.chunks.codec import checksums
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossy import Method, code_chunk, is_coded
from cake_hf.restore.prompt import Prompt
from cake_hf.transfer.landing import byte_view
from cake_hf.transfer.writer import Coded, pack

Pieces = Callable[[int], Sequence[torch.Tensor]]


class LossySchedule:
    """What is coded of one prompt.

    Args:
        method: of the cache; None for an exact cache, of which nothing is coded.
        prompt: from `open_prompt`.
        pieces: returns a block's pieces `[1, tokens, heads, head_dim]` in the layers.
    """

    def __init__(self, method: Method | None, prompt: Prompt, pieces: Pieces) -> None:
        self._method = method
        self._prompt = prompt
        self._pieces = pieces

    def has(self, index: int) -> bool:
        """Returns whether a block is coded."""
        prompt = self._prompt
        return self._method is not None and bool(lossy_tokens([prompt.blocks[index]], prompt.layout, prompt.call.past))

    def code(self, index: int) -> Coded | None:
        """Codes a block that the model has just run, in the layers; returns it as it is stored, None if it stays exact."""
        if self._method is None or not self.has(index):
            return None
        layout = self._prompt.layout_of(index)
        targets = self._pieces(index)
        packed = pack(targets, layout)
        packed.await_copy()
        payload = byte_view(packed.memory)[: layout.nbytes]
        encoded = code_chunk(payload, layout, self._method)
        with torch.inference_mode():
            for piece, target, part in zip(layout.pieces, targets, packed.memory.split(layout.sizes), strict=False):
                if is_coded(piece):
                    target.copy_(part.view(target.dtype).view(target.shape))
        return Coded(self._method.name, encoded, checksums(payload, layout))

    def tokens(self, count: int) -> int:
        """Returns how many tokens of the first `count` blocks are coded."""
        if self._method is None:
            return 0
        return lossy_tokens(self._prompt.blocks[:count], self._prompt.layout, self._prompt.call.past)


def lossy_tokens(blocks: Iterable[Block], layout: ChunkLayout, past: int) -> int:
    """Returns how many tokens of these blocks a lossy codec codes.

    Args:
        blocks: of a prompt, counted from the first one that is new.
        layout: of a full chunk.
        past: tokens of the prompt before the new ones.
    """
    if not any(map(is_coded, layout.pieces)):
        return 0
    return sum(block.tokens for block in blocks if block.fills(layout.chunk_size) and past + block.start > 0)
