"""One stage in a process of its own: `python -m benchmarks.gpu_check.child STAGE UNTIL FILE FOLDER SHARED [--rehearse]`."""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu_check import attention, ceilings, device_codec, layerwise, newer, parity, single, ttft
from benchmarks.gpu_check.desk import Desk, NotHere
from benchmarks.gpu_check.outcome import DONE, FAILED, NO_GPU, NOT_HERE, RUNNING, Plain, write
from benchmarks.gpu_check.sizes import ON_A_GPU, REHEARSAL, Sizes
from benchmarks.machine import Machine
from benchmarks.workbench import cheap_collections
from cake_hf.util.redaction import shown

RUN: dict[str, Callable[[Desk], None]] = {
    "ceilings": ceilings.run,
    "parity": parity.run,
    "attention": attention.run,
    "ttft": ttft.run,
    "loading": single.run_loading,
    "decoding": single.run_decoding,
    "saving": single.run_saving,
    "layerwise": layerwise.run,
    "codecs": newer.run_codecs,
    "device_codec": device_codec.run,
    "serving": newer.run_serving,
}


def run_stage(name: str, sizes: Sizes, until: float, file: Path, folder: Path, shared: Path) -> Plain:
    """Run one stage; what it has come to is in the file at any time.

    Args:
        name: of the stage.
        sizes: of the check.
        until: when it is ended from outside, in seconds since the epoch.
        file: for its result.
        folder, shared: for what it makes, and for what later stages use, too.

    Returns:
        What is in the file at last.
    """
    if sizes.device != "cpu" and not torch.cuda.is_available():
        told: Plain = {"status": NO_GPU, "reason": "torch finds no GPU here; --rehearse runs tiny sizes on the CPU"}
        write(file, told)
        return told
    machine = Machine(sizes.device)
    state: Plain = {"status": RUNNING, "result": {}, "reason": ""}

    def keep(result: Plain) -> None:
        write(file, {**state, "result": result, "machine": {**machine.as_dict(), **disk(folder)}})
        state["result"] = result

    keep({})
    try:
        with cheap_collections():
            RUN[name](Desk(sizes, until, folder, shared, keep))
        state["status"] = FAILED if state["result"].get("failure") else DONE
        state["reason"] = state["result"].get("failure", "")
    except NotHere as missing:
        state.update(status=NOT_HERE, reason=str(missing))
    except Exception as error:
        traceback.print_exc()
        state.update(status=FAILED, reason=f"{type(error).__name__}: {shown(error)}")
    keep(state["result"])
    return state


def disk(folder: Path) -> Plain:
    """What stores are made on: its kind and size, and what was free."""
    usage = shutil.disk_usage(folder)
    known = {"disk_gib": round(usage.total / 2**30, 1), "disk_free_gib": round(usage.free / 2**30, 1)}
    return {**known, "disk_kind": _file_system(folder)}


def _file_system(folder: Path) -> str:
    """As Linux names it; empty elsewhere."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    mounts = [(line.split()[1], line.split()[2]) for line in lines]
    inside = [mount for mount in mounts if folder.absolute().is_relative_to(mount[0])]
    return max(inside, key=lambda mount: len(mount[0]))[1] if inside else ""


def main(arguments: Sequence[str]) -> int:
    """0 whatever the stage came to: that stands in its file."""
    name, until, *paths = (argument for argument in arguments if argument != "--rehearse")
    sizes = REHEARSAL if "--rehearse" in arguments else ON_A_GPU
    file, folder, shared = map(Path, paths)
    begin = time.perf_counter()
    state = run_stage(name, sizes, float(until), file, folder, shared)
    print(f"{name}: {state['status']} after {time.perf_counter() - begin:.1f} s {state['reason']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
