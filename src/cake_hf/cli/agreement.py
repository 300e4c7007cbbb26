"""Finds how far a prompt agrees with stored ones, whatever their cuts, and so where two prompts start to differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cake_hf.blocks import Block, tail_ends
from cake_hf.cli.inspect_store import Inventory, StoredChunk
from cake_hf.keys import block_keys


@dataclass(frozen=True)
class Agreement:
    """The longest stored beginning of a prompt.

    Attributes:
        tokens: its length.
        boundaries: the cuts that it was stored with.
        behind: tokens of the longest stored block that follows it and differs from the prompt's own; 0 if nothing is stored
            behind it.
    """

    tokens: int = 0
    boundaries: Sequence[int] = ()
    behind: int = 0


NOTHING = Agreement()
"""No stored prompt starts as this one does."""


def agreement(
    inventory: Inventory, namespace: str, tokens: memoryview, chunk_size: int, known: Mapping[str, Block]
) -> Agreement:
    """Follows a prompt through a store, block by block.

    Args:
        inventory: of the store.
        namespace: to search.
        tokens: of the prompt, 64-bit integers.
        chunk_size: of the namespace.
        known: the prompt's stored blocks, by key; blocks before one of these may be gone.
    """
    children: dict[str, list[StoredChunk]] = {}
    for chunk in inventory.chunks.values():
        children.setdefault(chunk.metadata.parent, []).append(chunk)
    ways: dict[str, tuple[str, Block]] = {key: ("", block) for key, block in known.items()}
    best, open_ends = (0, namespace), [(0, namespace), *((block.end, key) for key, block in known.items())]
    while open_ends:
        end, parent = open_ends.pop()
        best = max(best, (end, parent))
        for child in children.get(parent, ()):
            key = child.metadata.key
            for block in _ways(end, child.chunk_size, len(tokens)):
                if block_keys(namespace, tokens, [block], chunk_size, parent) == [key]:
                    if key not in known:
                        open_ends.append((block.end, key))
                    ways[key] = parent, block
    end, last = best
    path = list(_back(last, ways))[::-1]
    behind = max((child.chunk_size for child in children.get(last, ())), default=0)
    return Agreement(end, tail_ends(path, chunk_size), behind)


def _back(key: str, ways: Mapping[str, tuple[str, Block]]) -> Iterator[Block]:
    """Returns the blocks that lead to a key, last one first; each ends where the one returned before it starts."""
    while key in ways:
        key, block = ways[key]
        yield block


def _ways(start: int, tokens: int, most: int) -> Iterator[Block]:
    """Returns the ways in which these tokens may have been run: in one forward, or one by one."""
    if start + tokens <= most:
        yield from (Block(start, start + tokens, singly) for singly in (False, True))
