"""How much memory does a warm restore need beside the KV itself? In chunks per loader thread.

Method: a fresh process builds the same model, restores the prompt once unobserved (to pay what is paid once per process),
then restores it into a second cache and looks at how far its resident memory (RSS) rose at the highest point. The KV that is
there afterwards is subtracted. This is done twice. Load-only, the rest is what reading, checking and placing took. From both
ends it is that, the staged chunks, and the working memory of a forward: the model's, not ours, but they cannot be told apart,
so this is an upper bound of ours. Neither includes the prompt's suffix.

The number counts pages that were touched, of any kind, by any thread, at one moment. It does not count address space that was
reserved and never touched (the buffers' headroom for further tokens), and the operating system's page cache. malloc is told
to return big blocks at once, so that freed memory of the first restore cannot hide what the second one takes. On Linux the
kernel itself keeps the highest point (VmHWM, reset through clear_refs), exact to a few dozen pages; if that is not allowed, a
thread looks every half millisecond and may miss a short peak.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.children import environment
from benchmarks.figures import Figure, Goal, Result
from benchmarks.models import build_model, build_prompt
from benchmarks.settings import Settings
from benchmarks.timing import Sample
from benchmarks.workbench import Workbench, await_loaders
from cake_hf.errors import CakeError
from cake_hf.stores.local import LocalStore

FEW_CHUNKS = Goal(3.0)
STRATEGIES = ("load", "both")
SAMPLING_SECONDS = 0.0005
GIVE_BACK_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "4096"}


@dataclass
class Peak:
    """Resident bytes before something, and at the highest point during it.

    Attributes:
        before, highest: bytes.
        method: "kernel", or "sampled" if the kernel does not let us reset its own record.
    """

    before: int
    highest: int = 0
    method: str = "kernel"


def measure(bench: Workbench) -> Result:
    """Measures in a fresh process, once per round, three times at most."""
    title = "Memory of a warm restore beside the KV"
    if not Path("/proc/self/status").exists():
        return Result(title, {}, {"reason": "this system has no /proc"})
    if bench.settings.device != "cpu":
        return Result(title, {}, {"reason": "the KV of a GPU is not resident memory of the process"})
    answers = [_ask_child(bench) for _ in range(min(3, bench.settings.repeats))]
    threads = bench.settings.limits.loader_threads
    chunks = {
        strategy: Sample(tuple(a[strategy]["extra_bytes"] / a[strategy]["chunk_bytes"] / threads for a in answers))
        for strategy in STRATEGIES
    }
    return Result(
        title,
        {
            "chunks_per_thread": Figure.of("load-only, chunks per thread", chunks["load"], "chunks", FEW_CHUNKS),
            "chunks_per_thread_with_forward": Figure.of(
                "both + forward, chunks per thread", chunks["both"], "chunks", FEW_CHUNKS
            ),
        },
        {"loader_threads": threads, "looks": answers},
    )


def _ask_child(bench: Workbench) -> dict[str, Any]:
    """Runs this module in a new process; its result is the last line of its output.

    Raises:
        CakeError: it failed.
    """
    question = {
        "settings": bench.settings.as_dict(),
        "store": str(bench.filled_store().root),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(question)]
    child = subprocess.run(command, env={**environment(), **GIVE_BACK_AT_ONCE}, capture_output=True, text=True)
    if child.returncode:
        raise CakeError(f"The process that measures memory failed:\n{child.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def answer_for(question: dict[str, Any]) -> dict[str, Any]:
    """Returns, in the fresh process, what each strategy's restore takes."""
    torch.set_num_threads(question["threads"])
    settings = Settings.from_dict(question["settings"])
    store = LocalStore(question["store"])
    bench = Workbench(settings, build_model(settings), build_prompt(settings), store.root)
    return {strategy: look(bench, store, strategy) for strategy in STRATEGIES}


def look(bench: Workbench, store: LocalStore, strategy: str) -> dict[str, Any]:
    """Restores, forgets, and restores again under observation.

    Raises:
        CakeError: not all was restored, or chunks were computed that should have been loaded, so that this would be the
            memory of something else.
    """
    chunks = bench.settings.chunks
    with bench.cache(store, strategy=strategy) as cache:
        cache.prefill(bench.ids)
    del cache
    await_loaders()
    gc.collect()
    with bench.cache(store, strategy=strategy) as cache:
        with peak() as seen:
            report = cache.prefill(bench.ids)
            await_loaders()
        kv = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    restored = report.chunks_loaded + report.chunks_computed
    if restored != chunks or (strategy == "load" and report.chunks_computed):
        raise CakeError(f"{report.chunks_loaded} of {chunks} chunks were loaded. {report.reason}")
    return {
        "extra_bytes": seen.highest - seen.before - kv,
        "kv_bytes": kv,
        "chunk_bytes": kv / chunks,
        "chunks_computed": report.chunks_computed,
        "method": seen.method,
    }


@contextmanager
def peak() -> Iterator[Peak]:
    """Watches this process's resident memory while the body runs."""
    seen = Peak(_resident("VmRSS"))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the record of the highest point starts anew
    except OSError:
        seen.method = "sampled"
    field, stop = ("VmHWM" if seen.method == "kernel" else "VmRSS"), threading.Event()
    watcher = threading.Thread(target=_watch, args=(seen, stop), name="bench-memory", daemon=True)
    if seen.method == "sampled":
        watcher.start()
    try:
        yield seen
    finally:
        seen.highest = max(seen.highest, _resident(field))
        stop.set()


def _watch(seen: Peak, stop: threading.Event) -> None:
    while not stop.wait(SAMPLING_SECONDS):
        seen.highest = max(seen.highest, _resident("VmRSS"))


def _resident(field: str) -> int:
    """Returns the bytes that the kernel counts for this process under that name."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise CakeError(f"/proc/self/status has no {field}.")


if __name__ == "__main__":
    print(json.dumps(answer_for(json.loads(sys.argv[1]))))
