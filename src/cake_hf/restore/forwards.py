"""The main thread's side of a restore: runs the model on one chunk after another, each where the model can continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from cake_hf.blocks import Block
from cake_hf.chunks.codec import checksums
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.chunks.lossy import Method, code_chunk, is_coded
from cake_hf.errors import CakeError
from cake_hf.layers import SlidingWindowLayer, TokenMajorLayer
from cake_hf.restore.audit import Audit
from cake_hf.restore.carried import Carried
from cake_hf.restore.pacing import Steps
from cake_hf.restore.prompt import Prompt
from cake_hf.restore.saving import Saver
from cake_hf.scheduling.frontier import Frontier, Outcome
from cake_hf.scheduling.pace import RestorePace
from cake_hf.transfer.landing import byte_view
from cake_hf.transfer.writer import Coded, pack

Progress = Callable[[int, int], None]
"""Called from time to time with (chunks that are there, all chunks)."""

Forward = Callable[[Callable[[], bool], dict[str, Any]], object]
"""Runs the model on one chunk with the cache: `forward(preempted, arguments)`. It raises `ForwardPreempted` at the next layer
once `preempted()` says that the chunk has come from the store.
"""

GATED = "gated"
"""The outcome, in a timeline, of a computed piece that waited for loads within its layers."""


class ForwardPreempted(Exception):
    """Not an error: the chunk that a forward computes has come from the store, so the forward ends at the next layer."""


class Layers:
    """Counts the layers that a forward has reached.

    Args:
        count: the number of the model's layers.

    Attributes:
        began: when its first layer started, in monotonic seconds.
        worked: processor seconds that the thread had used by then.
    """

    def __init__(self, count: int) -> None:
        self._count, self._begun = count, 0
        self.began, self.worked = time.monotonic(), time.thread_time()

    def next(self) -> None:
        """Records that a layer starts."""
        if not self._begun:
            self.began, self.worked = time.monotonic(), time.thread_time()
        self._begun += 1

    @property
    def share(self) -> float:
        """The share of the layers that is done."""
        return min(1.0, max(0, self._begun - 1) / self._count)


def record_suffix(prompt: Prompt, devices: Sequence[torch.device], begin: float, *, gated: bool) -> None:
    """Records the span of the prompt's suffix, after it has run, and the seconds of the whole prefill."""
    wait_for_devices(devices)
    end = time.monotonic()
    prompt.record("compute", -1, begin, end, GATED if gated else "computed")
    prompt.report.prefill_seconds = end - prompt.started


def wait_for_devices(devices: Iterable[torch.device]) -> None:
    """Waits for queued GPU work, which is not done when forward returns: the two ends can meet only if done means done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def never() -> bool:
    """False: for a forward that no load preempts."""
    return False


def no_progress(done: int, total: int) -> None:
    """Ignores the progress."""


Pieces = Callable[[int], Sequence[torch.Tensor]]


class LossySchedule:
    """The canonical lossy schedule of one prompt: a full chunk goes through the codec before later chunks see its KV.

    So a computed chunk becomes, in the cache, exactly what a loaded chunk decodes to, and the output does not depend on what
    was stored or saved. These stay exact: the first chunk of a prompt, which later tokens attend to most; the recent part
    (tails before declared cuts, decoded tokens, and the suffix unless it is a full chunk); sliding windows and recurrent
    states.

    Args:
        method: the codec of the cache; None for an exact cache, in which nothing is coded.
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
        blocks: the blocks of a prompt, counted from the first one that is new.
        layout: the layout of a full chunk.
        past: tokens of the prompt before the new ones.
    """
    if not any(map(is_coded, layout.pieces)):
        return 0
    return sum(block.tokens for block in blocks if block.fills(layout.chunk_size) and past + block.start > 0)


class ChunkRuns:
    """The chunk runs of one restore.

    Args:
        prompt: from `open_prompt`.
        layers: all layers of the cache, of any kind.
        kept: the layers that keep each token.
        forward: runs the model on one chunk.
        carried: what the model carries from chunk to chunk.
        frontier: the ledger.
        steps: decides which chunk comes next, and records which are made.
        pace: records how long forwards take.
        saver: saves each new chunk.
        lossy: codes each chunk that it has to.
        audit: compares computed chunks that are stored.
        devices: the devices that the model computes on.

    Attributes:
        waited: the piece that was last in the model waited for loads in its layers.
    """

    def __init__(
        self,
        prompt: Prompt,
        layers: Sequence[Any],
        kept: Sequence[TokenMajorLayer],
        forward: Forward,
        carried: Carried,
        frontier: Frontier,
        steps: Steps,
        pace: RestorePace,
        saver: Saver,
        lossy: LossySchedule,
        audit: Audit,
        devices: Sequence[torch.device],
    ) -> None:
        self.waited = False
        self._prompt = prompt
        self._kept = kept
        self._watched: list[Any] = [*kept, *(layer for layer in layers if isinstance(layer, SlidingWindowLayer))]
        self._count = len(layers)
        self._forward = forward
        self._carried = carried
        self._frontier = frontier
        self._steps = steps
        self._pace = pace
        self._saver = saver
        self._lossy = lossy
        self._audit = audit
        self._devices = devices

    def compute(self, index: int) -> bool:
        """Runs the model on one chunk and has it saved; returns False if the forward ended early.

        It ends early if the chunk has come from the store, or if it was a trial that is not worth finishing.
        """
        self.stand(index)
        begin = time.monotonic()
        self.waited = False
        layers = Layers(self._count)
        worked = time.thread_time()
        try:
            coded = self._run(index, partial(self._is_left, index, layers))
        except ForwardPreempted:
            wait_for_devices(self._devices)
            end = time.monotonic()
            self._saw(index, end - layers.began, layers.share, time.thread_time() - layers.worked)
            self._frontier.give_back(index)
            self._prompt.record("compute", index, begin, end, "preempted")
            return False
        end = time.monotonic()
        if not self.waited:
            self._saw(index, end - begin, 1.0, time.thread_time() - worked)
        load = self._frontier.outcomes().get(index)
        self._steps.computed(index)
        self._prompt.record("compute", index, begin, end, GATED if self.waited else "computed")
        if self._is_exact(index):
            if load not in (Outcome.CORRUPT, Outcome.MISSED):
                self._audit.computed(index, partial(self._saver.pieces, index))
            self._saver.chunk(index, load, coded)
            self._saver.state(index)
        return True

    def stand(self, index: int) -> None:
        """Moves what the model carries to the start of chunk `index`, running chunks again that are there if necessary."""
        near = self._steps.stand(self._carried.come_near, index) if self._carried else index
        for chunk in range(near, index):
            begin = time.monotonic()
            self._run(chunk, never)
            self._prompt.record("compute", chunk, begin, time.monotonic(), "computed")
            if self._is_exact(chunk):
                self._saver.state(chunk)

    def show(self, chunks: int) -> None:
        """Makes the first `chunks` chunks the content of the layers that keep each token."""
        self._show_tokens(self._prompt.blocks[chunks - 1].end if chunks else 0)

    def _run(self, index: int, preempted: Callable[[], bool]) -> Coded | None:
        """Runs the model on a chunk and puts it through the lossy codec, if there is one; returns what that has made of it."""
        self._carried.begin()
        for start, end in self._prompt.blocks[index].forwards:
            self._show_tokens(start)
            self._forward(preempted, self._prompt.call.chunk(start, end))
            self._check_content(end)
            self._carried.ran()
        self._carried.passed(index)
        wait_for_devices(self._devices)
        return self._lossy.code(index)

    def _is_exact(self, index: int) -> bool:
        """Returns whether a chunk that was computed is what its key says: it has seen no rounded KV."""
        return index < self._frontier.exact_until()

    def _is_left(self, index: int, layers: Layers) -> bool:
        """Returns whether a forward ends before its next layer: its chunk has arrived, or was a trial not worth finishing."""
        layers.next()
        if self._steps.preempted(index):
            return True
        if not layers.share or not self._frontier.is_trial(index):
            return False
        wait_for_devices(self._devices)
        worked = time.thread_time() - layers.worked
        self._saw(index, time.monotonic() - layers.began, layers.share, worked)
        return not self._frontier.goes_on(index)

    def _show_tokens(self, tokens: int) -> None:
        for layer in self._kept:
            layer.show(self._prompt.call.past + tokens)

    def _check_content(self, tokens: int) -> None:
        length = self._prompt.call.past + tokens
        dtypes = [buffer.dtype for layer in self._kept for buffer in layer.buffers]
        as_foreseen = dtypes == [piece.dtype for piece in self._prompt.layout.pieces if not piece.windowed]
        if not as_foreseen or any(not layer.is_own or layer.get_seq_length() != length for layer in self._watched):
            raise CakeError(
                "Something other than the model changed the cache during the prefill (a hook that edits the KV?); "
                "use a DynamicCache together with it."
            )

    def _saw(self, index: int, seconds: float, share: float, worked: float) -> None:
        """Records the time of a forward on a full chunk, by position. With a GPU, the thread's own time says nothing."""
        if index in self._prompt.full:
            number = self._prompt.blocks[index].start // self._prompt.layout.chunk_size
            told = worked if all(device.type == "cpu" for device in self._devices) else None
            self._pace.saw_forward(number, seconds, share, worked=told)
