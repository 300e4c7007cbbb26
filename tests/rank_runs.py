"""What each rank of `test_tensor_parallel.py` does: `rank_runs.py RANK FOLDER`. Prints, case by case, what it has seen.

Both ranks run the same cases in the same order. A rank that fails leaves the other one alone, and the process group ends that.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

import family_runs
from cake_hf import CakeCache, Limits, LocalStore, MemoryStore, Store
from cake_hf.chunks.codec import parse_header
from cake_hf.testing import FaultStore, GateStore, WrapperStore
from families import family_model
from models import CHUNK, Outcome, build, difference, oracle, prompt, run
from naming import given
from stored import filled_store, without

RANK, FOLDER, SIZE = int(sys.argv[1]), Path(sys.argv[2]), 2
SECONDS = 200
FEW = {"max_new_tokens": 3}  # each token is a meeting of the ranks in each layer
LLAMA: Any = None


def sharded(model: Any, name: str) -> Any:
    """As a new user does it: saved by one rank, loaded by all, each its part."""
    if RANK == 0:
        model.save_pretrained(FOLDER / name)
    dist.barrier()
    parallel = DistributedConfig(tp_size=SIZE, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, distributed_config=parallel).eval()


@cache
def filled(model: Any) -> MemoryStore:
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as saving:
        saving.prefill(prompt(), whole=True)
    return store


@cache
def expected(model: Any) -> Outcome:
    return oracle(model, prompt(), **FEW)


def seen(model: Any, store: Store, **options: Any) -> dict[str, Any]:
    """What a restore did on this rank, and in what its outcome is not that of a `DynamicCache`."""
    with CakeCache(model, store, **{"chunk_size": CHUNK, "save": False, "strategy": "load", **options}) as used:
        outcome = run(model, prompt(), used, **FEW)
        report = used.report
    made = [span.chunk for span in report.timeline if span.outcome == "computed" and span.chunk >= 0]
    return {
        "difference": difference(outcome, expected(model)),
        "made": made,
        "loaded": report.chunks_loaded,
        "computed": report.chunks_computed,
        "failed": report.chunks_failed,
        "reason": report.reason,
    }


def with_faults(store: MemoryStore, kind: str, *chunks: int) -> FaultStore:
    faults = {}
    for key in store.keys():  # noqa: SIM118  # a store is no mapping
        if parse_header(store.read(key) or b"")[0].index in chunks:
            faults[key] = kind
    return FaultStore(store, faults)


def case_cold_and_warm() -> Any:
    store = LocalStore(FOLDER / "kv")
    cold = seen(LLAMA, store, save=True)
    dist.barrier()
    keys = len(list(store.keys()))
    both = seen(LLAMA, store, strategy="both")
    return {"cold": cold, "warm": seen(LLAMA, store), "both": both["difference"], "made": both["made"], "keys": keys}


def case_a_corrupt_chunk_on_one_rank() -> Any:
    store = filled(LLAMA)
    return seen(LLAMA, with_faults(store, "flip", 3, 5) if RANK == 1 else store)


def case_other_faults_on_each_rank() -> Any:
    return seen(LLAMA, with_faults(filled(LLAMA), "error" if RANK else "drop", *((1, 2) if RANK else (2, 6))))


def case_nothing_stored_on_one_rank() -> Any:
    store = filled(LLAMA)
    return seen(LLAMA, MemoryStore() if RANK == 0 else store)


def case_reads_hang_on_one_rank() -> Any:
    store = filled(LLAMA)
    gate = GateStore(store)
    try:
        return seen(LLAMA, gate if RANK == 0 else store, limits=Limits(read_timeout=0.5))
    finally:
        gate.open()


def case_a_store_that_cannot_be_asked_on_one_rank() -> Any:
    class Mute(WrapperStore):
        def contains(self, keys: Any) -> list[bool]:
            raise OSError("not today")

    store = filled(LLAMA)
    return seen(LLAMA, Mute(store) if RANK == 1 else store)


def case_the_two_sides_meet_elsewhere_on_each_rank() -> Any:
    """Both compute and load; the one has few of its loads at once, the other one many, and the rest when these two are done."""
    gate = GateStore(filled(LLAMA))
    gate.open(2 if RANK else 5)
    try:
        return seen(LLAMA, gate, strategy="both", limits=Limits(loader_threads=1, read_timeout=0.5))
    finally:
        gate.open()


def case_not_called_alike() -> Any:
    return seen(LLAMA, filled(LLAMA), chunk_size=CHUNK if RANK else 2 * CHUNK)["reason"]


def case_the_namespace_says_which_part() -> Any:
    with CakeCache(LLAMA, MemoryStore(), chunk_size=CHUNK) as used:
        return used._session.bound_model.metadata()["parallel"], used._session.bound_model.namespace()


def case_windows() -> Any:
    """The rank that has lost a chunk has to go on from a place where all have what is before it."""
    model = sharded(family_model("gemma3"), "gemma3")
    store = filled_store(model, family_runs.IDS)
    plain = family_runs.generate(model, DynamicCache(config=model.config), prefill_chunk_size=CHUNK)
    found = []
    for kept in (store, without(store, 2, 4) if RANK else store):
        with CakeCache(model, kept, chunk_size=CHUNK, save=False, strategy="load") as used:
            outcome = family_runs.generate(model, used)
            made = [span.chunk for span in used.report.timeline if span.outcome == "computed"]
        found.append({"difference": family_runs.difference(outcome, plain), "made": made})
    return found


def case_a_batch() -> Any:
    ids, store = torch.cat([prompt(), prompt().flip(1)]), filled(LLAMA)
    options = {**FEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with CakeCache(LLAMA, with_faults(store, "flip", 4) if RANK else store, chunk_size=CHUNK, strategy="load") as used:
        tokens = LLAMA.generate(ids, **given(used), **options)
    return torch.equal(tokens, LLAMA.generate(ids, **options)), used.report.chunks_loaded


def case_sharded_by_hand() -> Any:
    model: Any = build("llama")
    mesh = dist.init_device_mesh("cpu", (SIZE,))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}  # type: ignore[dict-item]
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    store = filled(model)
    return seen(model, with_faults(store, "flip", 3) if RANK else store)


def case_sharded_in_another_way() -> Any:
    model: Any = build("llama")
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=dist.init_device_mesh("cpu", (SIZE,)))
    return seen(model, MemoryStore())


def main() -> None:
    global LLAMA
    torch.set_num_threads(1)
    join = f"file://{FOLDER / 'meeting'}"
    dist.init_process_group("gloo", init_method=join, rank=RANK, world_size=SIZE, timeout=timedelta(seconds=SECONDS))
    os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(SIZE))
    LLAMA = sharded(build("llama"), "llama")
    assert [layer.self_attn.k_proj.weight.to_local().shape[0] for layer in LLAMA.model.layers] == [16] * 3
    cases: dict[str, Callable[[], Any]] = {n: case for n, case in globals().items() if n.startswith("case_")}
    found = {}
    try:
        for name, case in cases.items():
            found[name] = case()
            dist.barrier()
    except Exception:
        found[name] = traceback.format_exc()
    print(json.dumps(found), flush=True)
    os._exit(0)  # a rank that failed must not wait for the other one


if __name__ == "__main__":
    main()
