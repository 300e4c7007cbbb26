"""Processes that share one directory with a budget, killed at random, for as long as you like.

    python tests/soak.py --minutes 10

Some of them write and read chunks through the store, some generate with a `CakeCache` on a tiny model. The budget is a quarter
of what they write. At the end, and all the time: nothing corrupt was served, the budget held, nothing was left behind, and
no process grew in threads, files or memory. Exit code 1 if any of that is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPTS, PROMPT_CHUNKS = 6, 30
"""What the generating processes ask about."""
STORED_CHUNKS = 300
CHUNK_TOKENS = (64, 256, 512)
"""Sizes of the chunks that the other processes write: 33 to 262 KB."""
PATIENCE = 120.0
LEAST_KILLS, LEAST_LOOKS = 3, 9
"""Before that many there is nothing to judge."""


# In the processes. Those that only use the store import nothing but the store, and so start in a tenth of a second.


def store_worker(source: str, root: str, folder: str, budget: int, eviction: str, seed: int) -> None:
    """Writes, reads and deletes chunks at random; whatever it reads must be what was made."""
    package = types.ModuleType("cake_hf")
    package.__path__ = [source]
    sys.modules["cake_hf"] = package
    from cake_hf.stores import LocalStore

    draw, done = random.Random(seed), Counter[str]()
    values = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    keys = sorted(values)
    store = LocalStore(root, budget, eviction)
    for step in range(10**9):
        key = draw.choice(keys)
        chance = draw.random()
        if chance < 0.5:
            cut = draw.randrange(len(values[key]))
            parts = [memoryview(values[key])[:cut], memoryview(values[key])[cut:]]
            done["written"] += store.write(key, parts, replace=draw.random() < 0.2)
        elif chance < 0.53:
            done["deleted"] += store.delete(key)
        elif chance < 0.55:
            store = LocalStore(root, budget, eviction)
        else:
            value = store.read(key)
            assert value is None or value == values[key], f"chunk {key} is not what was written"
            done["read"] += value is not None
            done["missed"] += value is None
        if step % 25 == 0:
            tell(done)


def cache_worker(root: str, budget: int, eviction: str, seed: int) -> None:
    """Generates with a cache; the logits must be those of a run without one, bit for bit."""
    import torch

    from cake_hf import CakeCache
    from cake_hf.stores import LocalStore
    from models import CHUNK, NEW_TOKENS, oracle, prompt, run, shared_model

    draw, done, model = random.Random(seed), Counter[str](), shared_model("llama")
    prompts = [prompt(CHUNK * PROMPT_CHUNKS + 5, seed=number) for number in range(PROMPTS)]
    expected = [oracle(model, ids).logits for ids in prompts]
    assert len(expected[0]) == NEW_TOKENS
    while True:
        number = draw.randrange(PROMPTS)
        with CakeCache(model, LocalStore(root, budget, eviction), chunk_size=CHUNK) as cache:
            outcome = run(model, prompts[number], cache)
            assert torch.equal(outcome.logits, expected[number]), "the logits are not those of a run without a cache"
            assert cache.flush(PATIENCE)
            done["loaded"] += cache.report.chunks_loaded
            done["computed"] += cache.report.chunks_computed
            done["failed"] += cache.report.chunks_failed
            done["saved"] += cache.report.chunks_saved
        tell(done)


def tell(done: Counter[str]) -> None:
    """One line for the parent: what was done, and how large this process is."""
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    size = {"threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd")), "resident": resident}
    print(json.dumps({"size": size, "done": done}), flush=True)


# In the parent.


@dataclass
class Worker:
    """One of the processes, through its lives.

    Attributes:
        command: that starts it; a seed is added.
        spared: it is never killed, so that it can be watched growing.
        sizes: what it has told about its size, in this life.
        done: what it has done, in its lives before.
    """

    command: list[str]
    spared: bool
    lives: int = 0
    sizes: list[dict[str, int]] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    latest: Counter[str] = field(default_factory=Counter)
    process: subprocess.Popen[str] | None = None
    listener: threading.Thread | None = None

    def start(self, seed: int) -> None:
        self.lives += 1
        self.sizes, self.latest = [], Counter()
        self.process = subprocess.Popen([*self.command, str(seed)], stdout=subprocess.PIPE, text=True)
        self.listener = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        self.listener.start()

    def kill(self) -> None:
        assert self.process is not None
        assert self.listener is not None
        assert self.process.poll() in (None, -signal.SIGKILL), f"a process died by itself: {self.command}"
        self.process.kill()
        self.process.wait(PATIENCE)
        self.listener.join(PATIENCE)
        self.done.update(self.latest)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if line.endswith("\n"):
                    told = json.loads(line)
                    self.sizes.append(told["size"])
                    self.latest = Counter(told["done"])


@dataclass
class Outcome:
    """What was seen.

    Attributes:
        budget: bytes.
        most: most bytes that the directory had, reservations and leftovers included.
        largest: bytes of the largest chunk.
        kills: how many.
        done: what the processes did, all lives together.
        left: files that were left behind after the last sweep.
        chunks: how many chunks were there at the end, all of them whole.
        growth: per process that was not killed, how its size changed from the first third of its life to the last.
        wrong: what should not be so.
    """

    budget: int
    largest: int
    most: int = 0
    kills: int = 0
    chunks: int = 0
    left: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    growth: list[dict[str, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def soak(seconds: float, processes: int, caches: int, seed: int, base: Path) -> Outcome:
    """Run it.

    Args:
        seconds: how long at least; and on until enough has happened to judge it by, `PATIENCE` more at most.
        processes: that share the directory.
        caches: how many of them generate.
        seed: of all that is left to chance but for the machine's own timing.
        base: an empty folder.
    """
    import cake_hf

    root, folder = base / "store", base / "chunks"
    sizes = make_chunks(folder)
    written = sum(sizes) + (PROMPTS * PROMPT_CHUNKS * 16_384 if caches else 0)
    outcome = Outcome(budget=written // 4, largest=max(sizes))
    workers = []
    for number in range(processes):
        shared = [str(root), str(outcome.budget), ("lru", "front-first")[number // 2 % 2]]
        if number < processes - caches:
            role = ["-I", "-S", __file__, "store", cake_hf.__path__[0], str(root), str(folder), *shared[1:]]
        else:
            role = [__file__, "cache", *shared]
        workers.append(Worker([sys.executable, *role], spared=number in (0, processes - 1)))
    draw, end = random.Random(seed), time.monotonic() + seconds
    for worker in workers:
        worker.start(draw.randrange(2**31))
    try:
        while time.monotonic() < end or (time.monotonic() < end + PATIENCE and not has_shown_enough(outcome, workers)):
            time.sleep(draw.uniform(0.0, 0.4))
            outcome.most = max(outcome.most, bytes_of(root))
            # A process that generates takes seconds to start; killed as often as the others it would never begin.
            victim = draw.choice(workers)
            if not victim.spared and (victim.command[1] == "-I" or draw.random() < 0.05):
                victim.kill()
                victim.start(draw.randrange(2**31))
                outcome.kills += 1
    finally:
        for worker in workers:
            try:
                worker.kill()
            except AssertionError as error:
                outcome.wrong.append(str(error))
            outcome.done.update(worker.done)
    look_back(outcome, root, [worker for worker in workers if worker.spared])
    return outcome


def has_shown_enough(outcome: Outcome, workers: list[Worker]) -> bool:
    """Whether the budget was reached, processes have died, and the others have done all that they do, long enough."""
    done = sum((worker.done + worker.latest for worker in workers), Counter[str]())
    return (
        outcome.most > outcome.budget - 2 * outcome.largest
        and outcome.kills >= LEAST_KILLS
        and all(done[what] for what in ("written", "deleted", "read", "missed"))
        and all(len(worker.sizes) >= LEAST_LOOKS for worker in workers if worker.spared)
    )


def make_chunks(folder: Path) -> list[int]:
    """Whole chunk files, in chains of ten; gives their sizes."""
    import torch

    from cake_hf.chunks.codec import ChunkMetadata, checksums, encode_header
    from cake_hf.chunks.layout import ChunkLayout, Piece

    folder.mkdir()
    sizes, key = [], ""
    for number in range(STORED_CHUNKS):
        tokens = CHUNK_TOKENS[number // 10 % len(CHUNK_TOKENS)]
        layout = ChunkLayout(tokens, tuple(Piece(f"layers.{n}.keys", 2, 16, torch.float32) for n in range(4)))
        draw = random.Random(number)
        parent, key = (key if number % 10 else "0" * 40), draw.randbytes(20).hex()
        payload = draw.randbytes(layout.nbytes)
        facts = ChunkMetadata(key, parent, number % 10, "0" * 40, "soak", checksums(payload, layout))
        value = encode_header(layout, facts) + payload
        (folder / key).write_bytes(value)
        sizes.append(len(value))
    return sizes


def bytes_of(root: Path) -> int:
    """Bytes of all chunks and of what is being written or was left by the dead; exact, since the account is locked for it."""
    from cake_hf.stores.byte_count import ByteCount
    from cake_hf.stores.folder import BYTES, Folder

    if not root.is_dir():
        return 0
    with ByteCount(root / BYTES).opened():
        folder = Folder(root)
        return sum(entry.nbytes for entry in folder.entries()) + folder.partial_bytes()


def look_back(outcome: Outcome, root: Path, spared: list[Worker]) -> None:
    """Judge it, now that no process uses it any more."""
    from cake_hf.chunks.codec import check_file
    from cake_hf.stores import LocalStore

    store = LocalStore(root)
    store.check_writable()
    outcome.left = sorted(os.listdir(root / "partial"))
    for key in store.keys():  # noqa: SIM118 - a store is no dict
        value = store.read(key)
        assert value is not None
        check_file(value, key)
        outcome.chunks += 1
    outcome.most = max(outcome.most, bytes_of(root))
    outcome.growth = [growth(worker.sizes) for worker in spared]
    if outcome.left:
        outcome.wrong.append(f"{len(outcome.left)} files were left behind")
    if outcome.most > outcome.budget:
        outcome.wrong.append(f"the directory had {outcome.most:,} bytes, the budget is {outcome.budget:,}")
    if outcome.done["failed"]:
        outcome.wrong.append(f"{outcome.done['failed']} chunks could not be used")
    for change in outcome.growth:
        if change["threads"] > 0 or change["files"] > 0 or change["resident"] > 0.1:
            outcome.wrong.append(f"a process grew: {change}")


def growth(sizes: list[dict[str, int]]) -> dict[str, float]:
    """Threads and files: by how many the most of the last third is over that of the first two. Memory: by which share."""
    if len(sizes) < LEAST_LOOKS:
        return {"threads": 0, "files": 0, "resident": 0.0, "looks": len(sizes)}
    third = len(sizes) // 3
    change: dict[str, Any] = {
        name: max(size[name] for size in sizes[-third:]) - max(size[name] for size in sizes[:-third])
        for name in ("threads", "files")
    }
    middle, last = (max(size["resident"] for size in part) for part in (sizes[third:-third], sizes[-third:]))
    return {**change, "resident": round(last / middle - 1, 4), "looks": len(sizes)}


def main() -> int:
    if sys.argv[1:2] == ["store"]:
        source, root, folder, budget, eviction, seed = sys.argv[2:]
        store_worker(source, root, folder, int(budget), eviction, int(seed))
    if sys.argv[1:2] == ["cache"]:
        root, budget, eviction, seed = sys.argv[2:]
        cache_worker(root, int(budget), eviction, int(seed))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--caches", type=int, default=2, help="how many of them generate with a CakeCache")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        outcome = soak(options.minutes * 60, options.processes, options.caches, options.seed, Path(base))
    for name, value in vars(outcome).items():
        shown = f"{value:,}" if isinstance(value, int) else dict(value) if isinstance(value, Counter) else value
        print(f"{name:8} {shown}")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
