"""Work on a GPU's memory is in order: copies in, copies out, the model's own, and the host's. See `gpu_streams`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cake_hf import MemoryStore
from cake_hf.chunks.layout import ChunkLayout, Piece
from cake_hf.transfer import copy_streams
from cake_hf.transfer.copy_streams import let_copies_out_end
from cake_hf.transfer.landing import Landing, place_for
from cake_hf.transfer.writer import pack
from engine_runs import needs_engine, stepping
from gpu_streams import GPU, Streams, gpu_streams, on_gpu
from models import shared_model

TOKENS, CHUNKS = 4, 6
LAYOUT = ChunkLayout(
    TOKENS, (Piece("layers.0.keys", 2, 4, torch.float32, 0), Piece("layers.0.values", 2, 3, torch.bfloat16, 0))
)


@pytest.fixture
def streams() -> Iterator[Streams]:
    """The streams of a GPU; all that saves makes its own anew."""
    with gpu_streams() as made:
        copy_streams._out.clear()
        yield made
        copy_streams._out.clear()


def buffers_on_gpu() -> list[torch.Tensor]:
    return [on_gpu(1, TOKENS * CHUNKS, piece.heads, piece.head_dim, dtype=piece.dtype) for piece in LAYOUT.pieces]


def filled(streams: Streams, landing: Landing) -> torch.Tensor:
    """Reads a chunk into a landing, as a store does; returns the memory."""
    memory = torch.frombuffer(landing.parts[0].obj, dtype=torch.uint8)
    streams.on_host("read", writes=[memory])
    return memory


def load(streams: Streams, place: Any, index: int, *, staged: bool = False) -> torch.Tensor:
    landing = place.landing(index, staged=staged)
    memory = filled(streams, landing)
    landing.commit(len(landing.parts))
    if staged:
        landing.commit_parts(len(landing.parts))
    landing.release()
    return memory


@pytest.mark.parametrize("staged", [False, True])
def test_loads_are_in_order_with_computing_and_with_each_other(streams: Streams, staged: bool) -> None:
    """Two slots for six chunks: each is filled again and again."""
    buffers = buffers_on_gpu()
    streams.on_gpu("clearing", writes=buffers)
    place = place_for(buffers, LAYOUT, 2)
    memory = {load(streams, place, index, staged=staged).data_ptr() for index in range(CHUNKS)}
    assert len(memory) == 2
    place.catch_up()
    streams.on_gpu("attention", reads=buffers)
    assert streams.races == []
    copying = {stream for stream, _ in streams.kept}
    assert streams.main.name not in copying
    assert {start for _, start in streams.kept} >= {buffer.data_ptr() for buffer in buffers}


def test_attention_that_does_not_wait_for_loads_is_seen(streams: Streams) -> None:
    """Negative control."""
    buffers = buffers_on_gpu()
    place = place_for(buffers, LAYOUT, 2)
    load(streams, place, 1)
    streams.on_gpu("attention", reads=buffers)
    assert streams.races == ["copy, then attention"]


def test_a_slot_that_is_filled_before_the_copy_from_it_is_done_is_seen(streams: Streams) -> None:
    """Negative control: a late read that goes on writing after its slot was given back."""
    place = place_for(buffers_on_gpu(), LAYOUT, 1)
    memory = load(streams, place, 0)
    streams.on_host("late read", writes=[memory])
    assert streams.races == ["copy, then late read"]


def test_loads_before_the_buffers_are_made_are_seen(streams: Streams) -> None:
    """Negative control."""
    buffers = buffers_on_gpu()
    place = place_for(buffers, LAYOUT, 1)
    streams.on_gpu("clearing", writes=buffers)
    load(streams, place, 0)
    assert streams.races == ["clearing, then copy"]


def test_saving_is_in_order_with_computing_and_with_the_writer(streams: Streams) -> None:
    pieces = [buffer[:, :TOKENS] for buffer in buffers_on_gpu()]
    streams.on_gpu("computing", writes=pieces)
    slot = pack(pieces, LAYOUT)
    slot.await_copy()
    streams.on_host("writing to the store", reads=[slot.memory])
    pack(pieces, LAYOUT)
    let_copies_out_end()
    streams.on_gpu("the next chunk's state", writes=pieces)
    assert streams.races == []
    assert {start for _, start in streams.kept} == {piece.untyped_storage().data_ptr() for piece in pieces}


def test_what_does_not_wait_for_saving_is_seen(streams: Streams) -> None:
    """Negative control: the writer, and the model."""
    pieces = [buffer[:, :TOKENS] for buffer in buffers_on_gpu()]
    streams.on_gpu("computing", writes=pieces)
    slot = pack(pieces, LAYOUT)
    streams.on_host("writing to the store", reads=[slot.memory])
    streams.on_gpu("the next chunk's state", writes=pieces)
    assert streams.races == ["copy, then writing to the store", "copy, then the next chunk's state"]


# Continuous batching: the engine's steps have a stream of their own.


def loaders(blocks: list[torch.Tensor]) -> Any:
    bound, layout = SimpleNamespace(limits=SimpleNamespace(loader_threads=1)), SimpleNamespace(nbytes=blocks[0].nbytes)
    kind = import_module("cake_hf.serving.loads").Loaders
    return kind(bound, layout, lambda *_: blocks, None, None, GPU, lambda: None)


@needs_engine
def test_a_block_that_is_still_being_saved_is_not_loaded_into(streams: Streams) -> None:
    """Its request has ended, and another one has got the block."""
    block = on_gpu(2, 16, dtype=torch.uint8)
    streams.on_gpu("computing", writes=[block])
    pack([block], ChunkLayout(1, (Piece("layers.0.keys", 2, 4, torch.float32, 0),)))
    streams.main.synchronize()  # as at each step's end
    loaders([block])._copy(torch.ones(32, dtype=torch.uint8), [block])
    assert bool((block == 1).all())
    streams.on_gpu("the next step", reads=[block])
    assert streams.races == []


class Asked:
    """The hooks of an engine, with the stream that was current when they were asked."""

    def __init__(self, hooks: Any, streams: Streams) -> None:
        self._hooks, self._streams = hooks, streams
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)

    def plan(self) -> Any:
        self.seen.append(self._streams.current.name)
        return self._hooks.plan()


@needs_engine
def test_what_is_saved_between_steps_is_ordered_with_the_steps(streams: Streams) -> None:
    with stepping(shared_model("llama"), MemoryStore()) as steps:
        steps.processor.inputs_and_outputs.compute_stream = own = streams.stream()
        steps.processor.scheduler.hooks = asked = Asked(steps.processor.scheduler.hooks, streams)
        steps.add("one", list(range(5)))
        steps.run()
    assert len(asked.seen) > 1
    assert set(asked.seen) == {own.name}
    assert streams.current is streams.main
