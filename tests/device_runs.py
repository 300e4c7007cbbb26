"""What `test_devices.py` has done in a process of its own, where torch knows a second device. Prints each case's complaint."""

from __future__ import annotations

import copy
import json
import logging
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

import accelerate
import pytest
import torch
from transformers import DynamicCache

import family_runs
import models
import test_movers
from cake_hf import CakeCache, Limits, MemoryStore
from cake_hf.model.kv_layout import kv_template
from cake_hf.model.look import devices_of, home_device, where_computed
from cake_hf.model.numerics import numerics_metadata
from cake_hf.testing import GateStore
from cake_hf.transfer.landing import DevicePlace, place_for
from families import family_model, here
from forwards import meeting_at
from models import CHUNK, CHUNKS, Outcome, build, difference, prompt
from naming import given
from second_device import OnOther, add_second_device
from stored import filled_store, without

OTHER = add_second_device()
CPU = torch.device("cpu")
HOLES = (0, 3, 4)


def split(model: Any, *there: int) -> Any:
    """With those of its layers on the second device, by a map, as accelerate spreads a model."""
    names = [name for name, _ in model.named_modules() if name.count(".") == 1] + ["lm_head"]
    where = dict.fromkeys((name for name in names if name != "model.layers"), CPU)
    for number in range(len(model.model.layers)):
        where[f"model.layers.{number}"] = OTHER if number in there else CPU
    return accelerate.dispatch_model(model, where, main_device="cpu")


@cache
def llama() -> Any:
    return split(build("llama", attention="eager"), 1)


@cache
def run(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> Outcome:
    """As `models.run`, with its tensors on the host, and fewer tokens: each op on the second device goes through Python."""
    outcome = models.run(model, ids, cache, max_new_tokens=3, **options)
    for tensors in (outcome.keys, outcome.values):
        tensors[:] = [tensor.cpu() for tensor in tensors]
    return outcome


@cache
def expected(model: Any) -> Outcome:
    return run(model, prompt(), dynamic(model), prefill_chunk_size=CHUNK)


def dynamic(model: Any) -> Any:
    return DynamicCache(config=model.config)


def devices_in(used: CakeCache) -> list[torch.device]:
    assert all(type(buffer) is OnOther for buffer in used.layers[1].buffers)
    return [buffer.device for layer in used.layers for buffer in layer.buffers]


def case_mixing_devices_raises() -> None:
    """Negative control: the second device is one. KV on the wrong device does not go unnoticed."""
    model = llama()
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, strategy="load") as used:
        used.prefill(prompt())
        layer = used.layers[1]
        layer.keys = layer.keys.cpu()
        with pytest.raises(RuntimeError, match="same device"):
            run(model, prompt(), used)


def case_the_split_model_computes_what_the_plain_one_does() -> None:
    plain, model = build("llama", attention="eager"), llama()
    assert devices_of(model) == [CPU, OTHER]
    assert home_device(model) == CPU
    assert where_computed(model) == "cpu, other:0"
    assert difference(run(model, prompt(), None), run(plain, prompt(), None)) == ""
    facts = numerics_metadata(model)
    assert [part[1]["device"] for part in facts["parts"] if part[0] == "model.layers.1.mlp.up_proj"] == ["other"]
    assert "parts" not in numerics_metadata(plain)


def case_every_way_to_restore() -> None:
    model = llama()
    store = filled_store(model)
    holes = without(store, *HOLES)
    for kept, options, loaded in (
        (MemoryStore(), {}, 0),
        (store, {"strategy": "load"}, CHUNKS),
        (store, {"strategy": "compute"}, 0),
        (holes, {"strategy": "load"}, CHUNKS - len(HOLES)),
    ):
        with CakeCache(model, kept, chunk_size=CHUNK, save=False, **options) as used:
            outcome = run(model, prompt(), used)
            assert used.report.chunks_loaded == loaded, used.report
            assert devices_in(used) == [CPU, CPU, OTHER, OTHER, CPU, CPU]
            assert difference(outcome, expected(model)) == ""


def case_the_two_sides_meet() -> None:
    model = llama()
    store = filled_store(model)
    for meeting in (1, CHUNKS - 2):
        gate = GateStore(store)
        with CakeCache(
            model, gate, chunk_size=CHUNK, save=False, limits=Limits.from_environment(loader_threads=1)
        ) as used:
            kv_template(model)
            with meeting_at(model, gate, meeting, CHUNKS - meeting):
                outcome = run(model, prompt(), used)
            assert (used.report.chunks_computed, used.report.chunks_loaded) == (meeting, CHUNKS - meeting)
        assert difference(outcome, expected(model)) == ""


def case_a_flipped_bit_shows() -> None:
    """Negative control, on the layer that is on the second device."""
    model = llama()
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, strategy="load") as used:
        used.prefill(prompt())
        used.layers[1].buffers[1].view(torch.int32)[0, 3].bitwise_xor_(1 << 22)
        assert difference(run(model, prompt(), used), expected(model)) != ""


def case_offloaded_to_the_host_and_computed_on_the_device() -> None:
    model = accelerate.cpu_offload(build("llama", attention="eager"), execution_device=OTHER)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert devices_of(model) == [OTHER]
    assert where_computed(model) == "other:0, weights offloaded"
    with CakeCache(model, filled_store(model), chunk_size=CHUNK, strategy="load") as used:
        outcome = run(model, prompt(), used)
        assert used.report.chunks_loaded == CHUNKS, used.report
        assert devices_in(used) == [OTHER] * 6
        assert difference(outcome, expected(model)) == ""


def case_windows_and_states() -> None:
    places = {"gemma3": (1, 2), "qwen3_next": (1, 2), "lfm2": (0,)}
    for family, there in ((family, places[family]) for family in here(*places)):
        model = copy.deepcopy(family_model(family))
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")  # the others count in a dtype that only a GPU can
        split(model, *there)
        plain = family_runs.generate(model, dynamic(model), prefill_chunk_size=CHUNK)
        store = filled_store(model, family_runs.IDS)
        for kept in (store, without(store, 2)):
            with CakeCache(model, kept, chunk_size=CHUNK, save=False, strategy="load") as used:
                outcome = family_runs.generate(model, used)
                assert used.report.chunks_loaded > 0, (family, there, used.report)
                assert not used.report.reason or kept is not store, used.report.reason
            assert same(outcome, plain) == "", (family, there)


def case_batches_copies_and_handing_over() -> None:
    model = llama()
    store, ids = filled_store(model), torch.cat([prompt(), prompt().flip(1)])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    for _ in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as used:
            assert torch.equal(model.generate(ids, **given(used), **options), plain)
    assert used.report.chunks_loaded == 2 * CHUNKS, used.report
    with CakeCache(model, store, chunk_size=CHUNK) as used:
        used.prefill(prompt())
        for other in (copy.deepcopy(used), used.to_dynamic_cache(), used):
            assert torch.equal(model.generate(ids[:1], **given(other), **options), plain[:1])
        whole = CakeCache(
            model, store, chunk_size=512
        )  # the prompt is shorter: it is run in one piece, as without a cache
        assert torch.equal(model.generate(ids[:1], **options, num_beams=2, **given(whole)),
                           model.generate(ids[:1], **options, num_beams=2))  # fmt: skip


def case_a_place_on_two_devices() -> None:
    """Pieces that are in host memory and such that are not, of one chunk: in place, aside, and piece by piece."""
    for first, second in ((CPU, OTHER), (OTHER, CPU)):
        where = [first, second, first]
        buffers = [buffer.to(device) for buffer, device in zip(test_movers.make_buffers(), where, strict=True)]
        place = place_for(buffers, test_movers.LAYOUT)
        assert isinstance(place, DevicePlace)
        for index, staged in ((3, False), (1, True), (0, True)):
            landing = place.landing(index, staged=staged)
            test_movers.fill_parts(landing, index)
            landing.commit(2)
            expected = b"" if staged else test_movers.payload_of(index)[: sum(test_movers.LAYOUT.sizes[:2])]
            assert test_movers.chunk_in(buffers, index).rstrip(b"\0").startswith(expected.rstrip(b"\0"))
            assert not any(test_movers.chunk_in(buffers, index)[len(expected) :])
            landing.commit(3)
            assert staged == (test_movers.chunk_in(buffers, index) != test_movers.payload_of(index))
            if staged:
                landing.commit_parts(3)
            landing.release()
            place.catch_up()
            assert test_movers.chunk_in(buffers, index) == test_movers.payload_of(index)


def same(one: family_runs.Run, other: family_runs.Run) -> str:
    for outcome in (one, other):
        outcome.content.update({name: tensor.cpu() for name, tensor in outcome.content.items()})
    return family_runs.difference(one, other)


def main() -> None:
    logging.disable(logging.WARNING)
    cases: dict[str, Callable[[], None]] = {n: case for n, case in globals().items() if n.startswith("case_")}
    complaints = {}
    for name, case in cases.items():
        complaints[name] = ""
        try:
            case()
        except Exception:
            complaints[name] = traceback.format_exc()
    print(json.dumps(complaints))


if __name__ == "__main__":
    main()
