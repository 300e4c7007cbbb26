"""The order of work on a GPU, recorded where there is none: which work is certain to be done before which other work starts.

On a GPU two works on the same memory are in order if they are in one stream, if an event was waited for in between, or if the
host has waited for the first one. Anything else may go well a thousand times. `Streams` stands in for torch's streams and
events, keeps a vector clock for each of them and for the host, and notes every two works that touch the same memory, one of
them writing, and are in no order. It takes all threads of the host for one: what these owe each other is for other tests.

`OnGpu` is memory that says it is on a GPU. Copies from and to it are noted by themselves, in the stream that is current then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

GPU = torch.device("cuda", 0)
Clock = dict[str, int]


@dataclass
class Work:
    """One work.

    Attributes:
        name: for messages.
        actor, tick: it was the actor's so manyth; the actor is a stream, or the host.
        reads, writes: the memory, (first byte, last byte + 1) each.
    """

    name: str
    actor: str
    tick: int
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]

    def touches(self, other: Work) -> bool:
        """Whether both use the same memory, and one of them writes to it."""
        return (
            _overlap(self.writes, other.writes)
            or _overlap(self.reads, other.writes)
            or _overlap(self.writes, other.reads)
        )


@dataclass
class Streams:
    """All streams, and the host.

    Attributes:
        races: the works that are in no order, as "first, then second".
        kept: for each memory that was to be kept until a stream is done with it: the stream's name, and its first byte.
    """

    races: list[str] = field(default_factory=list)
    kept: set[tuple[str, int]] = field(default_factory=set)
    _works: list[Work] = field(default_factory=list)
    _alive: list[torch.Tensor] = field(default_factory=list)  # so that no memory is used for something else
    _host: Clock = field(default_factory=dict)
    _made: int = 0

    def __post_init__(self) -> None:
        self.main = self.stream()
        self._current = [self.main]

    @property
    def current(self) -> Stream:
        """The stream that work goes to now."""
        return self._current[-1]

    def stream(self, device: Any = None, **_: Any) -> Stream:
        """Makes a stream."""
        self._made += 1
        return Stream(self, f"stream {self._made}")

    @contextmanager
    def using(self, stream: Stream | None) -> Iterator[None]:
        """Makes a stream the current one; none changes nothing, as in torch."""
        self._current.append(stream or self.current)
        try:
            yield
        finally:
            self._current.pop()

    def on_gpu(self, name: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()) -> None:
        """Notes a work that is started on the current stream."""
        self._note(name, self.current.name, _merged(self.current.clock, self._host), reads, writes)

    def on_host(self, name: str, *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()) -> None:
        """Notes what the host does itself."""
        self._note(name, "host", self._host, reads, writes)

    def host_waits(self, clock: Clock) -> None:
        """The host goes on when all of that is done."""
        _merged(self._host, clock)

    def _note(
        self, name: str, actor: str, clock: Clock, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None:
        self._alive += [*reads, *writes]
        tick = clock[actor] = clock.get(actor, 0) + 1
        work = Work(name, actor, tick, *([_bytes(one) for one in some] for some in (reads, writes)))
        for other in self._works:
            if other.tick > clock.get(other.actor, 0) and work.touches(other):
                self.races.append(f"{other.name}, then {name}")
        self._works.append(work)


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, streams: Streams, name: str) -> None:
        self.name, self.device = name, GPU
        self.clock: Clock = {}
        self.streams = streams

    def wait_stream(self, other: Stream) -> None:
        """As in torch: what is started here from now on comes behind what was started there so far."""
        _merged(self.clock, other.clock)

    def synchronize(self) -> None:
        """As in torch."""
        self.streams.host_waits(self.clock)


class Event:
    """Stands in for `torch.cuda.Event`. As in torch, waiting for one that was not recorded waits for nothing."""

    def __init__(self, **_: Any) -> None:
        self._recorded: tuple[Streams, Clock] | None = None

    def record(self, stream: Stream) -> None:
        """As in torch."""
        self._recorded = stream.streams, dict(stream.clock)

    def synchronize(self) -> None:
        """As in torch."""
        if self._recorded is not None:
            streams, clock = self._recorded
            streams.host_waits(clock)


_noting: list[Streams] = []


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and so do all views of it."""

    device = property(lambda self: GPU)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _noting and function is torch._foreach_copy_:
            _note_copy(_noting[-1], args[0], args[1])
        elif _noting and function is torch.Tensor.copy_:
            _note_copy(_noting[-1], [args[0]], [args[1]])
        return super().__torch_function__(function, types, args, kwargs or {})

    def record_stream(self, stream: Any) -> None:
        """As in torch: keeps the memory, if it is freed, until the stream is done with what it has now."""
        stream.streams.kept.add((stream.name, self.untyped_storage().data_ptr()))


def _note_copy(streams: Streams, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    streams.on_gpu("copy", reads=sources, writes=targets)


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """New memory that says it is on a GPU."""
    return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)


@contextmanager
def gpu_streams() -> Iterator[Streams]:
    """Has torch make these streams and events in the body."""
    streams = Streams()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", _StreamType("Stream", (), {"made_by": staticmethod(streams.stream)}))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: streams.current)
        patch.setattr(torch.cuda, "stream", streams.using)
        patch.setattr(torch.cuda, "device", lambda device: streams.using(None))
        _noting.append(streams)
        try:
            yield streams
        finally:
            _noting.pop()


class _StreamType(type):
    """`torch.cuda.Stream` is called, and asked whether something is one."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.made_by(*args, **kwargs)  # type: ignore[attr-defined]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Stream)


def _merged(clock: Clock, other: Clock) -> Clock:
    for actor, tick in other.items():
        clock[actor] = max(tick, clock.get(actor, 0))
    return clock


def _bytes(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _overlap(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(begin < last and first < end for begin, end in some for first, last in others)
