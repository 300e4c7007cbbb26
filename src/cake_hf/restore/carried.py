"""State that a model carries from one chunk to the next beside the KV of each token: sliding windows and recurrent states.

The KV of a full-attention layer can be committed in any order. What is carried cannot: it belongs to one place in the prompt,
and the model can continue only there. So it has a *standing*: the number of the chunk that can run next. Computing from the
front advances it chunk by chunk; if loads have brought the chunks in between, it is moved to where they end: windows are
rebuilt from the last chunks' own KV (`WindowBuffers` receive it), recurrent states from a snapshot (`StoredStates` reads it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cake_hf.blocks import Block
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.keys import state_key
from cake_hf.layers.recurrent import RecurrentLayer, states_of
from cake_hf.layers.sliding_window import SlidingWindowLayer
from cake_hf.restore.plan import window_begin
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.session import Session
from cake_hf.scheduling.frontier import Strategy
from cake_hf.transfer.single_reads import ReadBeside, read_state

Windows = Sequence[torch.Tensor]
"""The sliding-window pieces of one chunk, `[1, tokens, heads, head_dim]`, in payload order."""

ReadState = Callable[[int], "list[torch.Tensor] | None"]


class Carried:
    """The carrying layers of one cache, during one restore.

    Args:
        layers: all layers of the cache, of any kind.
        template: the same layers with some tokens in them.
        blocks: the blocks of the prompt, counted from chunk 0.
        past: the number of tokens in the layers now; chunk 0 comes after them.
        state_layout: the layout of a snapshot.
        loaded_block: returns a chunk's block if a load has brought it.
        read_state: returns the snapshot at the end of chunk `i`, `[anything]` per piece, if there is a usable one.

    Attributes:
        standing: the chunk that can run next; None if a forward was interrupted.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        template: Sequence[Any],
        blocks: Sequence[Block],
        past: int,
        state_layout: ChunkLayout,
        loaded_block: Callable[[int], Windows | None],
        read_state: ReadState,
    ) -> None:
        self.standing: int | None = 0
        self._windowed = [layer for layer in layers if isinstance(layer, SlidingWindowLayer)]
        self._recurrent = {n: layer for n, layer in enumerate(layers) if isinstance(layer, RecurrentLayer)}
        self._template = template
        self._blocks = blocks
        self._past = past
        self._state_layout = state_layout
        self._loaded_block = loaded_block
        self._read_state = read_state
        self._computed: dict[int, Windows] = {}
        self._brought: list[Windows] = []  # by the forwards of the chunk that is running
        self._base_windows = [layer.content for layer in self._windowed]
        self._base_states = {
            n: {name: state.clone() for name, state in states_of(layer).items()} for n, layer in self._recurrent.items()
        }

    def __bool__(self) -> bool:
        """Returns whether the model carries anything."""
        return bool(self._windowed or self._recurrent)

    @property
    def reach(self) -> int:
        """How many tokens the longest window reaches back."""
        return max((layer.reach for layer in self._windowed), default=0)

    def start(self) -> None:
        """Starts the restore: from now on the layers keep what `passed` asks for."""
        for layer in self._windowed:
            layer.watch(on=True)

    def begin(self) -> None:
        """Prepares to run a chunk.

        Until `passed`, what is carried belongs to no place, since the forward may be preempted or fail.
        """
        self.standing = None
        self._brought = []

    def ran(self) -> None:
        """Collects the windows after one of the forwards that make the chunk."""
        if self._windowed:
            self._brought.append([kept.transpose(1, 2) for layer in self._windowed for kept in layer.recent or ()])

    def passed(self, chunk: int) -> None:
        """Advances the standing after a chunk has run."""
        self.standing = chunk + 1
        if len(self._brought) > 1:
            self._computed[chunk] = [torch.cat(parts, dim=1) for parts in zip(*self._brought, strict=True)]
        elif self._brought:
            self._computed[chunk] = self._brought[0]
        begin = window_begin(self._blocks, chunk + 1, self.reach)
        for index in [index for index in self._computed if index < min(begin, chunk)]:
            del self._computed[index]

    def block(self, chunk: int) -> Windows | None:
        """Returns the sliding-window pieces of a chunk, if they are at hand."""
        computed = self._computed.get(chunk)
        return computed if computed is not None else self._loaded_block(chunk)

    def states(self) -> list[torch.Tensor]:
        """Returns the current recurrent states, in the order of a snapshot."""
        named = {
            f"layers.{n}.{name}": state
            for n, layer in self._recurrent.items()
            for name, state in states_of(layer).items()
        }
        return [named[piece.name] for piece in self._state_layout.pieces]

    def come_near(self, chunk: int) -> int:
        """Moves to that chunk or, if that is not possible, to the nearest earlier one where it is; returns which."""
        while not self._stand(chunk):
            chunk -= 1
        return chunk

    def go_back(self) -> None:
        """Moves to where the restore started."""
        for layer, content in zip(self._windowed, self._base_windows, strict=True):
            layer.put(content)
        for n, layer in self._recurrent.items():
            layer.put_states(self._base_states[n], self._template[n])
        self.standing = 0

    def end(self) -> None:
        """Ends the restore: releases the layers and what was kept.

        The reference to the restore, which holds this object, is dropped too: in a cycle, KV would wait for the garbage
        collector.
        """
        self._loaded_block = lambda chunk: None
        for layer in self._windowed:
            layer.watch(on=False)
        self._computed.clear()

    def _stand(self, chunk: int) -> bool:
        if self.standing == chunk:
            return True
        if chunk == 0:
            self.go_back()
            return True
        blocks = [self.block(index) for index in range(window_begin(self._blocks, chunk, self.reach), chunk)]
        at_hand = [block for block in blocks if block is not None]
        if len(at_hand) < len(blocks):
            return False
        if self._recurrent:
            states = self._read_state(chunk - 1)
            if states is None:
                return False
            self._put_states(states)
        self._put_windows(chunk, at_hand)
        self.standing = chunk
        return True

    def _put_windows(self, chunk: int, blocks: Sequence[Windows]) -> None:
        end = self._blocks[chunk - 1].end
        for number, (layer, (keys, values, _)) in enumerate(zip(self._windowed, self._base_windows, strict=True)):
            before: list[tuple[torch.Tensor, torch.Tensor]] = []
            if keys is not None and values is not None and end < self.reach:
                before = [(keys, values)]
            after = [(block[2 * number].transpose(1, 2), block[2 * number + 1].transpose(1, 2)) for block in blocks]
            joined = [torch.cat([pair[which] for pair in [*before, *after]], dim=2) for which in (0, 1)]
            layer.put((joined[0], joined[1], self._past + end))

    def _put_states(self, snapshot: Sequence[torch.Tensor]) -> None:
        pieces = {piece.name: state for piece, state in zip(self._state_layout.pieces, snapshot, strict=True)}
        for n, layer in self._recurrent.items():
            template = states_of(self._template[n])
            states = {name: pieces[f"layers.{n}.{name}"].view(state.shape) for name, state in template.items()}
            layer.put_states(states, self._template[n])


class WindowBuffers:
    """Buffers for only those sliding-window pieces that are wanted.

    Args:
        prompt: from `open_prompt`.
        windows: see `RestorePlan`.
        template: the model's layers with some tokens in them; each has its buffers on its own device.
    """

    def __init__(self, prompt: Prompt, windows: dict[int, int], template: Sequence[Any]) -> None:
        self._blocks = prompt.blocks
        self._windows = windows
        layout, tokens = prompt.layout, sum(prompt.blocks[index].tokens for index in windows)
        with torch.inference_mode(False):
            self.buffers = [
                torch.empty(
                    (1, tokens, piece.heads, piece.head_dim),
                    dtype=piece.dtype,
                    device=template[piece.layer].keys.device,
                )
                for piece in layout.pieces[layout.everywhere :]
            ]

    def block(self, chunk: int) -> list[torch.Tensor] | None:
        """Returns the sliding-window pieces of a chunk that was loaded; None if they were not wanted."""
        if chunk not in self._windows:
            return None
        start = self._windows[chunk]
        return [buffer[:, start : start + self._blocks[chunk].tokens] for buffer in self.buffers]


class StoredStates:
    """The stored snapshots that one restore reads.

    Attributes:
        loaded: chunks whose state was read and is good.
        unusable: chunks whose stored state is not usable.
    """

    def __init__(self, session: Session, prompt: Prompt) -> None:
        self.loaded: set[int] = set()
        self.unusable: set[int] = set()
        self._session = session
        self._prompt = prompt
        self._reads: dict[int, ReadBeside[list[torch.Tensor]]] = {}

    def begin(self, chunk: int) -> ReadBeside[list[torch.Tensor]]:
        """Starts to read the state at that chunk's end, unless that was done."""
        if chunk not in self._reads:
            key, limits = state_key(self._prompt.keys[chunk]), self._session.limits
            slot = self._session.bound_store.sharing.begin_beside(limits.loader_threads, limits.read_timeout)
            read = partial(read_state, self._session.bound_store.store, key, self._prompt.state_layout)
            self._reads[chunk] = ReadBeside(read, "state", slot)
        return self._reads[chunk]

    def get(self, chunk: int) -> list[torch.Tensor] | None:
        """Returns the state at that chunk's end; None if there is no usable one, or it does not come in time."""
        wanted = self._session.strategy is not Strategy.COMPUTE and self._prompt.match.states[chunk]
        if not wanted or chunk in self.unusable:
            return None
        states = self.begin(chunk).wait(self._session.limits.read_timeout)
        (self.unusable if states is None else self.loaded).add(chunk)
        return states

    def let_go(self) -> None:
        """Ends the restore: reads still under way are left to their threads."""
        for read in self._reads.values():
            read.leave()
