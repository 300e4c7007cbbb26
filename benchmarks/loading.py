"""How near do loads into place come to bare reads? Compares the loader's threads with `preadv` by as many threads.

The files were written a moment ago, so both sides read them from the page cache. Besides reading, a loader claims, checks the
header and the payload's checksum, and reports. Two kinds of memory are compared: fresh memory, whose pages the kernel must
clear first, and memory that was written to before. A cache's memory is fresh as a rule, so the goal is set there. Each side
takes fresh memory in its own way: the loaders as a cache does (see `chunks.aligned_memory`), the bare reads as the system
gives it.
With used memory only the copying from the page cache is left, so it shows what a checksum costs beside that.

On a GPU the place is the device's memory, and the limit is the slower of the bare reads and one copy of as many pinned bytes.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.bare import read_file
from benchmarks.figures import Figure, Goal, Result
from benchmarks.timing import Sample, interleave
from benchmarks.workbench import Workbench, synchronize
from cake_hf.chunks.aligned_memory import advise, empty_aligned
from cake_hf.chunks.codec import header_size
from cake_hf.chunks.layout import ChunkLayout
from cake_hf.errors import CakeError
from cake_hf.keys import chunk_keys
from cake_hf.limits import STAGED_PER_THREAD
from cake_hf.scheduling.frontier import Frontier, Outcome, Strategy
from cake_hf.stores.folder import Folder
from cake_hf.stores.local import LocalStore
from cake_hf.transfer.landing import HostPlace, place_for
from cake_hf.transfer.loader import LoadJob, start_loaders
from cake_hf.util.sizes import bytes_text

NEARLY_BARE = Goal(0.9, at_most=False)
GIGA = 10**9

Arm = Callable[[], float]
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Chunks:
    """The chunks to be read: those of the bench's prompt.

    Attributes:
        store: with all of them.
        keys: in order.
        layout: of each.
        device: where loads are to end.
    """

    store: LocalStore
    keys: Sequence[str]
    layout: ChunkLayout
    device: str

    @classmethod
    def of(cls, bench: Workbench) -> Chunks:
        """Takes the chunks of the bench's prompt."""
        s, store = bench.settings, bench.filled_store()
        session = bench.session(store)
        with closing(session):
            keys = chunk_keys(session.bound_model.namespace(), bench.ids[0, : s.tokens].tolist(), s.chunk_size)
            return cls(store, keys, session.bound_model.layout(), s.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads."""
        return len(self.keys) * self.layout.nbytes

    def memory(self) -> Tensors:
        """Returns buffers on the host, in untouched pages."""
        blocks = [mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _, size in self._sizes()]
        return [self._shaped(torch.frombuffer(block, dtype=torch.uint8), n) for n, block in enumerate(blocks)]

    def cache_memory(self) -> Tensors:
        """Returns buffers on the host as a cache has them. Pages that an allocator holds in store are given back first."""
        buffers = [empty_aligned([size], torch.uint8) for _, size in self._sizes()]
        if hasattr(mmap, "MADV_DONTNEED"):
            for buffer in buffers:
                advise(buffer, mmap.MADV_DONTNEED)
        return [self._shaped(buffer, n) for n, buffer in enumerate(buffers)]

    def device_memory(self) -> Tensors:
        """Returns buffers on the device."""
        return [self._shaped(torch.zeros(size, dtype=torch.uint8, device=self.device), n) for n, size in self._sizes()]

    def _sizes(self) -> Iterator[tuple[int, int]]:
        return ((number, size * len(self.keys)) for number, size in enumerate(self.layout.sizes))

    def _shaped(self, flat: torch.Tensor, number: int) -> torch.Tensor:
        piece = self.layout.pieces[number]
        return flat.view(piece.dtype).view(1, -1, piece.heads, piece.head_dim)


def measure(bench: Workbench) -> Result:
    """Times loaders and bare reads, interleaved, from one thread to as many as a cache has."""
    chunks, counts = Chunks.of(bench), range(1, bench.settings.limits.loader_threads + 1)
    on_gpu = chunks.device != "cpu"
    arms_with = _gpu_arms(chunks) if on_gpu else partial(_host_arms, chunks)
    arms: dict[str, Arm] = {}
    for count in counts:
        arms |= arms_with(count)
    samples = {name: Sample(tuple(found)) for name, found in interleave(arms, bench.settings.repeats).items()}
    figures: dict[str, Figure] = {}
    for count in counts:
        figures |= _gpu_figures(samples, count) if on_gpu else _host_figures(samples, count)
    rates = {name: chunks.nbytes / sample.median / GIGA for name, sample in samples.items()}
    title = f"Loading {bytes_text(chunks.nbytes)} into place, beside bare reads of the page cache"
    return Result(title, figures, {"gigabytes_per_second": rates})


def _host_arms(chunks: Chunks, count: int) -> dict[str, Arm]:
    touched = chunks.memory()
    for buffer in touched:
        buffer.zero_()
    arms: dict[str, Arm] = {}
    bare, loaders = partial(read_bare, chunks, count), partial(load, chunks, count)
    for kind, plain, ours in (
        ("touched", lambda: touched, lambda: touched),
        ("fresh", chunks.memory, chunks.cache_memory),
    ):
        arms[f"bare, {kind}, {count}"] = partial(_timed, plain, bare)
        arms[f"loaders, {kind}, {count}"] = partial(_timed, ours, loaders)
    return arms


def _host_figures(samples: dict[str, Sample], count: int) -> dict[str, Figure]:
    figures = {}
    for kind in ("touched", "fresh"):
        bare, loaders = samples[f"bare, {kind}, {count}"], samples[f"loaders, {kind}, {count}"]
        label = f"{_threads(count)}, {kind} memory: "
        figures[f"bare_{kind}_{count}"] = Figure.of(f"{label}bare", bare)
        goal = NEARLY_BARE if kind == "fresh" else None
        figures[f"speed_{kind}_{count}"] = Figure.ratio(f"{label}speed", bare, loaders, goal)
    return figures


def _gpu_arms(chunks: Chunks) -> Callable[[int], dict[str, Arm]]:
    """The arms for a number of threads; all use the same memory, since a long prompt's takes seconds to lock."""
    touched, target = chunks.memory(), chunks.device_memory()
    for buffer in touched:
        buffer.zero_()
    pinned = [_locked(buffer) for buffer in touched]

    def arms(count: int) -> dict[str, Arm]:
        return {
            f"bare, {count}": partial(_timed, lambda: touched, partial(read_bare, chunks, count)),
            f"copy, {count}": partial(_timed, lambda: target, partial(_copy, pinned, chunks.device)),
            f"loaders, {count}": partial(_timed, lambda: target, partial(load, chunks, count)),
        }

    return arms


def _locked(like: torch.Tensor) -> torch.Tensor:
    """Page-locked memory, where there is a GPU to copy from it."""
    return torch.zeros(like.shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())


def _gpu_figures(samples: dict[str, Sample], count: int) -> dict[str, Figure]:
    bare, copy, loaders = (samples[f"{name}, {count}"] for name in ("bare", "copy", "loaders"))
    slower = max(bare, copy, key=lambda sample: sample.median)
    return {
        f"bare_{count}": Figure.of(f"{_threads(count)}: bare reads", bare),
        f"copy_{count}": Figure.of(f"{_threads(count)}: pinned copy", copy),
        f"speed_{count}": Figure.ratio(f"{_threads(count)}: speed", slower, loaders, NEARLY_BARE),
    }


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _timed(memory: Callable[[], Tensors], work: Callable[[Tensors], None]) -> float:
    buffers = memory()
    begin = time.perf_counter()
    work(buffers)
    return time.perf_counter() - begin


def load(chunks: Chunks, count: int, buffers: Tensors) -> None:
    """Loads all chunks into the buffers with that many loader threads.

    Raises:
        CakeError: one of them could not be loaded.
    """
    frontier = Frontier([True] * len(chunks.keys), strategy=Strategy.LOAD)
    job = LoadJob(
        store=chunks.store,
        keys=chunks.keys,
        layout=chunks.layout,
        place=place_for(buffers, chunks.layout, STAGED_PER_THREAD * count),
        frontier=frontier,
        record=lambda actor, chunk, start, end, outcome: None,
        clock=time.monotonic,
    )
    for thread in start_loaders(job, count):
        thread.join()
    synchronize(chunks.device)
    outcomes = list(frontier.outcomes().values())
    if outcomes.count(Outcome.LOADED) != len(chunks.keys):
        raise CakeError(f"{outcomes.count(Outcome.LOADED)} of {len(chunks.keys)} chunks could be loaded.")


def read_bare(chunks: Chunks, count: int, buffers: Tensors) -> None:
    """Reads the same files to the same places with that many threads, and does nothing else."""
    place, size = HostPlace(buffers, chunks.layout), header_size(chunks.layout)
    files = Folder(chunks.store.root)
    left = iter(range(len(chunks.keys)))  # `next` on it is one step of the interpreter, so threads may share it

    def work() -> None:
        header = memoryview(bytearray(size))
        for index in left:
            read_file(files.path(chunks.keys[index]), [header, *place.landing(index, staged=False).parts])

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _copy(pinned: Tensors, device: str, buffers: Tensors) -> None:
    for source, target in zip(pinned, buffers, strict=True):
        target.copy_(source, non_blocking=True)
    synchronize(device)
