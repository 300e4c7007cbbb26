"""The stages of the GPU check, rehearsed on the CPU: that each runs to its end, keeps what it has, and says what went wrong.

Some are run with copies that are as late as they may be (see `late_copies`), as they would be on a GPU.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import cake_hf
from benchmarks import loading
from benchmarks.gpu_check import attention, child, newer, parity, single
from benchmarks.gpu_check.child import RUN, run_stage
from benchmarks.gpu_check.desk import Desk, NotHere
from benchmarks.gpu_check.goals import checks, goals, mismatches
from benchmarks.gpu_check.outcome import DONE, FAILED, NO_GPU, NOT_HERE, Plain, read
from benchmarks.gpu_check.page import of_result
from benchmarks.gpu_check.sizes import ON_A_GPU, REHEARSAL, Sizes
from benchmarks.gpu_check.stages import STAGES
from benchmarks.grid import run
from benchmarks.grid.exactness import runs_of
from benchmarks.workbench import Parity
from cake_hf import CakeCache, CakeError
from late_copies import late_copies
from waiting import PATIENCE

pytest_plugins = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

ONE_FAMILY = replace(REHEARSAL, families=("llama",))


def staged(name: str, folder: Path, sizes: Sizes = REHEARSAL, seconds: float = 10 * PATIENCE) -> Plain:
    """A stage as its process runs it; what is in its file at last."""
    for part in ("own", "shared"):
        (folder / part).mkdir(exist_ok=True)
    file = folder / f"{name}.json"
    run_stage(name, sizes, time.time() + seconds, file, folder / "own", folder / "shared")
    return read(file)


def desk(folder: Path, sizes: Sizes = REHEARSAL, seconds: float = 10 * PATIENCE) -> tuple[Desk, list[Plain]]:
    """A desk, and what is kept at it."""
    kept: list[Plain] = []
    for part in ("own", "shared"):
        (folder / part).mkdir(exist_ok=True)
    until = time.time() + seconds
    return Desk(sizes, until, folder / "own", folder / "shared", lambda r: kept.append(json.loads(json.dumps(r)))), kept


def whole(**stages: Plain) -> Plain:
    """These stages as a check's result."""
    return {"rehearsal": True, "machine": {}, "stages": stages}


def test_every_stage_has_its_function() -> None:
    assert [stage.name for stage in STAGES] == list(RUN)


def test_the_machine_is_named(tmp_path: Path) -> None:
    found = staged("ceilings", tmp_path)
    assert found["status"] == DONE
    known = {"cpu", "cores", "memory_gib", "disk_gib", "disk_free_gib", "disk_kind", "torch", "transformers"}
    assert found["machine"].keys() >= known
    assert found["result"]["figures"].keys() >= {"to_device", "from_device", "matmul", "disk_written", "disk_read"}
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize("late", [False, True], ids=["", "late copies"])
@pytest.mark.parametrize("name", ["decoding", "saving", "layerwise"])
def test_what_is_measured_with_the_large_model(tmp_path: Path, name: str, late: bool) -> None:
    with late_copies() if late else nullcontext():
        found = staged(name, tmp_path)
    assert (found["status"], found["reason"]) == (DONE, "")
    assert found["result"]["parity"]["checks"] > 0
    assert list(mismatches(found)) == []


def test_the_first_token_of_all_cells(tmp_path: Path) -> None:
    found = staged("ttft", tmp_path)
    assert (found["status"], found["reason"]) == (DONE, "")
    groups = found["result"]["grid"]["groups"]
    assert [group["tokens"] for group in groups] == [128, 64]
    for group in groups:
        assert [cell["source"] for cell in group["cells"]] == list(REHEARSAL.sources)
        assert group["compute_over_plain"]["value"] > 0
        assert all(cell["reached_gbps"] > 0 and cell["eta_as_reached"] > 0 for cell in group["cells"])
    assert list(mismatches(found)) == []
    assert checks(found["result"]) > 2 * 2 * len(REHEARSAL.sources)
    page = of_result(whole(ttft={**found, "seconds": 1.0, "limit": 2.0}))
    assert "A rehearsal" in page
    assert page.count("| disk |") == len(groups)


@pytest.mark.parametrize(("families", "late"), [(("qwen3_next",), False), (("gemma3", "qwen3"), True)])
def test_parity_of_tiny_models(tmp_path: Path, families: tuple[str, ...], late: bool) -> None:
    with late_copies() if late else nullcontext():
        found = staged("parity", tmp_path, replace(REHEARSAL, families=families))
    assert found["status"] == DONE
    assert found["result"]["wrong"] == found["result"]["left_out"] == []
    assert found["result"]["runs"] == runs_of(8) * len(families)
    assert (checks(found["result"]), list(mismatches(found["result"]))) == (found["result"]["runs"], [])


def test_a_model_that_cannot_be_examined_counts_as_wrong_and_the_next_one_is(tmp_path: Path) -> None:
    found = staged("parity", tmp_path, replace(REHEARSAL, families=("no_such", "none")))
    assert found["status"] == DONE
    assert [wrong.partition(":")[0] for wrong in found["result"]["wrong"]] == [
        f"{family}, float32, sdpa" for family in ("no_such", "none")
    ]
    (parity_goal, *_) = goals(whole(parity=found))
    assert parity_goal.met is not True


def test_models_for_which_there_is_no_time_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes 27 of 100 seconds; when the fourth is due, half as much again is no longer left."""
    sizes = replace(REHEARSAL, families=("a", "b", "c", "d"))
    at, kept = desk(tmp_path, sizes, seconds=100)
    now = at.now()
    monkeypatch.setattr(at, "now", lambda: now)

    def slow(at: Desk, variant: parity.Variant) -> Plain:
        nonlocal now
        now += 27.0
        return {"runs": 1, "wrong": []}

    monkeypatch.setattr(parity, "examined", slow)
    parity.run(at)
    assert (kept[-1]["runs"], kept[-1]["left_out"]) == (3, ["d, float32, sdpa"])
    assert "Left out, for want of time: d, float32, sdpa." in of_result(
        whole(parity={"status": DONE, "result": kept[-1]})
    )


def test_first_attention(tmp_path: Path) -> None:
    found = staged("attention", tmp_path)
    assert (found["status"], found["result"]["equal"]) == (DONE, True)
    assert {"sdpa, as it is", "sdpa, math"} <= set(found["result"]["equal_with"])
    assert found["result"]["settings"]["sdpa, cudnn"]["equal"] is None  # no such kernel here


def test_first_attention_sees_one_bit_and_names_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: ours differs, except with torch's plain kernel."""
    original = attention._outputs

    def altered(bench: Any, cache: Any) -> attention.Outputs:
        outputs = original(bench, cache)
        if cache is not None and torch.backends.cuda.flash_sdp_enabled():
            outputs[1].view(torch.int32).view(-1)[5] ^= 1
        return outputs

    monkeypatch.setattr(attention, "_outputs", altered)
    found = staged("attention", tmp_path)
    assert found["result"]["equal"] is False
    assert found["result"]["settings"]["sdpa, as it is"]["first_difference"].startswith("forward 1: by up to")
    assert found["result"]["equal_with"] == ["sdpa, math"]
    shown = goals(whole(attention=found))[1]
    assert (shown.met, shown.value) == (False, "not equal; equal with sdpa, math")


def test_loading_as_on_a_gpu(tmp_path: Path) -> None:
    """By this name the CPU is a device like others: the arms are those of a GPU."""
    at, kept = desk(tmp_path, replace(REHEARSAL, device="cpu:0", loader_threads=3))
    single.run_loading(at)
    assert {f"{what}_{count}" for what in ("bare", "copy", "speed") for count in (1, 2, 3)} <= set(kept[-1])
    assert kept[-1]["speed_2"]["goal"] == str(loading.NEARLY_BARE)
    assert goals(whole(loading={"result": kept[-1]}))[6].met is not None


def test_a_length_that_cannot_be_measured_makes_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(bench: Any, point: Any, *arguments: Any) -> Any:
        if point.tokens == 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(bench, point, *arguments)

    original = run.measure
    monkeypatch.setattr(run, "measure", fails)
    found = staged("ttft", tmp_path, replace(REHEARSAL, sources=("memory",)))
    assert (found["status"], found["reason"]) == (FAILED, "tiny, 128 tokens: CUDA out of memory")
    assert [len(group["cells"]) for group in found["result"]["grid"]["groups"]] == [0, 1]
    assert of_result(whole(ttft=found)).count("CUDA out of memory") == 1


def test_wrong_bits_while_the_store_is_filled_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(self: Parity, logits: torch.Tensor, label: str) -> None:
        original(self, logits + (label == "cold run"), label)

    original = Parity.check
    monkeypatch.setattr(Parity, "check", altered)
    found = staged("saving", tmp_path)
    assert [wrong.partition(":")[0] for wrong in mismatches(found)] == ["cold run"]


def test_later_stages_use_the_store_that_is_filled(tmp_path: Path) -> None:
    at, _ = desk(tmp_path)
    first = at.bench(64)
    files = {path: path.stat().st_mtime_ns for path in first.filled_store().root.glob("??/*")}
    assert len(files) == 128 // 16
    again = desk(tmp_path)[0].bench(128, repeats=1)
    assert {path: path.stat().st_mtime_ns for path in again.filled_store().root.glob("??/*")} == files
    assert again.cake_run(again.filled_store(), "load", strategy="load").report.chunks_loaded == 8
    assert again.parity.mismatches == []


def test_a_store_that_was_left_half_full_is_filled_anew(tmp_path: Path) -> None:
    """The time of the stage before was over."""
    store = desk(tmp_path)[0].bench(64).filled_store()
    for path in list(store.root.glob("??/*"))[::2]:
        path.unlink()
    again = desk(tmp_path)[0].bench(64)
    assert again.cake_run(again.filled_store(), "load", strategy="load").report.chunks_loaded == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_that_is_said(tmp_path: Path) -> None:
    found = staged("ttft", tmp_path, ON_A_GPU)
    assert found["status"] == NO_GPU
    assert "--rehearse" in found["reason"]


@pytest.mark.parametrize(
    "error", [CakeError("the disk is full"), torch.OutOfMemoryError("CUDA out of memory"), KeyError("x")]
)
def test_a_stage_that_fails_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(at: Desk) -> None:
        at.keep({"figures": {"one": 1}})
        raise error

    monkeypatch.setitem(child.RUN, "saving", fails)
    found = staged("saving", tmp_path)
    assert found["status"] == FAILED
    assert found["reason"].startswith(type(error).__name__)
    assert found["result"] == {"figures": {"one": 1}}
    assert found["machine"]["torch"] == torch.__version__


def test_what_is_not_in_this_version_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(at: Desk) -> None:
        raise NotHere("no such thing")

    monkeypatch.setitem(child.RUN, "codecs", missing)
    assert staged("codecs", tmp_path)["status"] == NOT_HERE


def test_codecs_where_caches_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU makes chunks faster than a disk takes them: all of them must find room in the queue."""
    asked: list[str] = []

    def coded(model: Any, store: Any, *, codec: str = "none", **options: Any) -> CakeCache:
        asked.append(codec)
        assert options["limits"].save_queue_bytes >= chunk * REHEARSAL.middle // REHEARSAL.chunk_size
        return CakeCache(model, store, **options)

    chunk = desk(tmp_path)[0].bench(64).chunk_bytes()
    monkeypatch.setattr(newer, "CakeCache", coded)
    monkeypatch.setenv("CAKE_HF_SAVE_QUEUE_BYTES", str(chunk))
    found = staged("codecs", tmp_path)
    assert (found["status"], found["reason"]) == (DONE, "")
    assert set(asked) == set(newer.CODECS)
    assert found["result"]["figures"]["size"]["value"] == 1.0


def test_serving_where_transformers_has_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    found = staged("serving", tmp_path)
    assert found["status"] == NOT_HERE
    assert "needs transformers 5.20" in found["reason"]


def test_serving_where_there_is_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, Any]] = []

    def ours(model: Any, inputs: list[list[int]], store: Any = None, **options: Any) -> None:
        asked.append(("ours", len(inputs), store))

    def plain(self: Any, inputs: list[list[int]], **options: Any) -> None:
        asked.append(("plain", len(inputs), None))

    monkeypatch.setattr(cake_hf, "generate_batch", ours, raising=False)
    monkeypatch.setattr(LlamaForCausalLM, "generate_batch", plain, raising=False)
    found = staged("serving", tmp_path)
    assert (found["status"], found["reason"]) == (DONE, "")
    assert found["result"]["figures"]["ratio"]["value"] > 0
    assert {(who, count) for who, count, _ in asked} == {("ours", 23), ("plain", 23)}
    assert all((store is not None) == (who == "ours") for who, _, store in asked)
