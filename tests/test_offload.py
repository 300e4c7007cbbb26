"""Models whose weights accelerate brings for each forward, from memory or from files: the same model as with them all there."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import cake_hf
import family_runs
from cake_hf import CakeCache, Limits, MemoryStore, UnsupportedModel, reads_only
from cake_hf.model.fingerprint import weights_digest
from cake_hf.model.kv_layout import kv_template
from cake_hf.model.look import devices_of, home_device, where_computed
from cake_hf.model.numerics import numerics_metadata
from cake_hf.model.weights import Offloaded
from cake_hf.testing import GateStore
from families import family_model, here
from models import _GQA, CHUNK, CHUNKS, build, difference, oracle, prompt, run, shared_model
from naming import given
from stored import filled_store

Offload = Callable[[Any, Path], Any]

# Older transformers take an offloaded model to be where its weights wait.
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`:UserWarning")


def to_memory(model: Any, folder: Path, **options: Any) -> Any:
    return accelerate.cpu_offload(model, **options)


def to_files(model: Any, folder: Path, **options: Any) -> Any:
    return accelerate.disk_offload(model, str(folder), **options)


def one_layer_to_files(model: Any, folder: Path) -> Any:
    where = {name: "cpu" for name, module in model.named_modules() if name and not list(module.children())}
    where = {name: device for name, device in where.items() if not name.startswith("model.layers.1")}
    where["model.layers.1"] = "disk"
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=str(folder))


def attention_at_once(model: Any, folder: Path) -> Any:
    """One hook for all weights of a layer's attention, which are there throughout its forward."""
    return accelerate.cpu_offload(model, preload_module_classes=["LlamaAttention"])


def loaded_so(model: Any, folder: Path) -> Any:
    """As a new user does it: saved, and loaded with a map."""
    model.save_pretrained(folder / "model")
    where = {"model.embed_tokens": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{n}": "disk" if n else "cpu" for n in range(model.config.num_hidden_layers)}
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model", device_map=where, offload_folder=folder / "weights")
    loaded.model.rotary_emb = model.model.rotary_emb  # `build` has rounded the frequencies; see `rounded_buffers`
    return loaded


OFFLOADS: list[Offload] = [to_memory, to_files, one_layer_to_files, attention_at_once, loaded_so]
every_offload = pytest.mark.parametrize("offload", OFFLOADS, ids=lambda offload: offload.__name__)


def tied() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_GQA, tie_word_embeddings=True)).eval()


def filled(model: Any) -> MemoryStore:
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as saving:
        saving.prefill(prompt())
        assert saving.flush(60)
        assert saving.report.chunks_saved == CHUNKS
    return store


def restored(model: Any, store: Any, **options: Any) -> tuple[Any, cake_hf.Report]:
    settings = {"chunk_size": CHUNK, "save": False, "strategy": "load", **options}
    with CakeCache(model, store, **settings) as cache:
        return run(model, prompt(), cache), cache.report


@every_offload
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloaded_and_plain_models_share_chunks(offload: Offload, dtype: str, tmp_path: Path) -> None:
    """The oracle is the model that restores: some processors round a single row's product by how its weights lie in memory."""
    plain, moved = shared_model("llama", dtype), offload(build("llama", dtype), tmp_path)
    assert any(weight.device.type == "meta" for weight in moved.parameters())
    for saver, user in ((plain, moved), (moved, plain)):
        outcome, report = restored(user, filled(saver))
        assert (report.chunks_loaded, report.chunks_computed, report.reason) == (CHUNKS, 0, "")
        assert difference(outcome, oracle(user, prompt())) == ""
    outcome, report = restored(moved, filled(plain), strategy="both")
    assert difference(outcome, oracle(moved, prompt())) == ""


@every_offload
def test_shared_weights_are_the_same_model_offloaded_or_not(offload: Offload, tmp_path: Path) -> None:
    """Once offloaded, the embeddings and the head that are one tensor are two."""
    moved = offload(tied(), tmp_path)
    outcome, report = restored(moved, filled(tied()))
    assert report.chunks_loaded == CHUNKS
    assert difference(outcome, oracle(moved, prompt())) == ""


@pytest.mark.parametrize("portable", [True, False])
def test_buffers_are_weights_too(portable: bool, tmp_path: Path) -> None:
    def with_buffer(value: float) -> Any:
        model = build("llama")
        model.model.norm.register_buffer("shift", torch.full((4,), value))
        return model

    plain, other = (weights_digest(with_buffer(value), portable=portable) for value in (1.0, 2.0))
    for number, offload in enumerate([to_memory, to_files]):
        for value, digest in ((1.0, plain), (2.0, other)):
            moved = offload(with_buffer(value), tmp_path / f"{number} {value}", offload_buffers=True)
            assert moved.model.norm.shift.device.type == "meta"
            assert weights_digest(moved, portable=portable) == digest
    assert plain != other


BY_FAMILY = {"gemma3": to_files, "lfm2": to_files, "qwen3_next": to_memory}


@pytest.mark.parametrize(("family", "offload"), [(family, BY_FAMILY[family]) for family in here(*BY_FAMILY)])
def test_windows_and_states(family: str, offload: Offload, tmp_path: Path) -> None:
    """Also where the probe has to run the model in two pieces."""
    moved = offload(copy.deepcopy(family_model(family)), tmp_path)
    store = filled_store(family_model(family), family_runs.IDS)
    with CakeCache(moved, store, chunk_size=CHUNK, save=False, strategy="load") as cache:
        outcome = family_runs.generate(moved, cache)
        assert (cache.report.chunks_loaded, cache.report.reason) == (family_runs.CHUNKS, "")
    plain = family_runs.generate(moved, DynamicCache(config=moved.config), prefill_chunk_size=CHUNK)
    assert family_runs.difference(outcome, plain) == ""
    # The decoding of offloaded experts takes other kernels, in transformers itself; the prompt's KV is that of the plain model.
    assert torch.equal(outcome.logits[0], family_runs.expected(family).logits[0])


def change_in_memory(model: Any, folder: Path) -> None:
    weight = model.model.layers[1].mlp.up_proj._hf_hook.weights_map["weight"]
    with torch.no_grad():
        weight.neg_()


def change_file(model: Any, folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight.dat"
    numbers = np.memmap(folder / name, dtype=np.float32, mode="r").copy()
    (folder / name).unlink()
    (-numbers).tofile(folder / name)


@pytest.mark.parametrize(("offload", "change"), [(to_memory, change_in_memory), (to_files, change_file)])
def test_a_change_of_what_is_offloaded_is_noticed(offload: Offload, change: Any, tmp_path: Path) -> None:
    """Negative control: what the hooks bring is what counts."""
    moved, changed = offload(build("llama"), tmp_path), build("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.neg_()
    store = filled(moved)
    assert restored(moved, store)[1].chunks_loaded == CHUNKS
    change(moved, tmp_path)
    outcome, report = restored(moved, store)
    assert report.chunks_loaded == 0
    assert difference(outcome, oracle(changed, prompt())) == ""
    assert restored(moved, filled(changed))[1].chunks_loaded == CHUNKS


@every_offload
def test_weights_are_read_for_their_checksum_once(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = offload(build("llama"), tmp_path)
    digest = weights_digest(moved)
    monkeypatch.setattr(Offloaded, "read", lambda self: pytest.fail("read again"))
    run(moved, prompt(), None)
    assert weights_digest(moved) == digest


def test_a_mapping_of_another_kind_is_read_each_time(tmp_path: Path) -> None:
    """Nothing cheap tells whether its content has changed."""

    class Lazy(dict[str, torch.Tensor]):
        def get(self, *_: object) -> None:
            return None

    held = Lazy(build("llama").state_dict())
    moved = accelerate.cpu_offload(build("llama"), state_dict=held)
    digest = weights_digest(moved)
    assert digest == weights_digest(build("llama"))
    held["lm_head.weight"] = held["lm_head.weight"] + 1
    assert weights_digest(moved) != digest


def test_a_forward_is_left_under_hooks(tmp_path: Path) -> None:
    """In the middle of a forward its chunk arrives: what hooks have brought meanwhile does no harm."""
    moved = attention_at_once(build("llama"), tmp_path)
    gate = GateStore(filled(shared_model("llama")))
    contested = 3
    forwards = 0
    with CakeCache(
        moved, gate, chunk_size=CHUNK, save=False, limits=Limits.from_environment(loader_threads=1)
    ) as cache:
        kv_template(moved)

        def arrive(*_: object) -> None:
            nonlocal forwards
            forwards += 1
            if forwards == contested + 1:
                gate.open()
                while not cache._work.preempted():
                    threading.Event().wait(0.001)

        handle = moved.model.layers[1].self_attn.register_forward_pre_hook(reads_only(arrive))
        outcome = run(moved, prompt(), cache)
        handle.remove()
        assert [span.chunk for span in cache.report.timeline if span.outcome == "preempted"] == [contested]
    assert difference(outcome, oracle(shared_model("llama"), prompt())) == ""
    outcome, report = restored(moved, gate)
    assert report.chunks_loaded == CHUNKS
    assert difference(outcome, oracle(shared_model("llama"), prompt())) == ""


@pytest.mark.parametrize("offload", [to_memory, loaded_so], ids=lambda offload: offload.__name__)
def test_an_offloaded_model_with_generate_and_a_batch(offload: Offload, tmp_path: Path) -> None:
    model = offload(build("llama"), tmp_path)
    inputs = {"input_ids": prompt(), "attention_mask": torch.ones_like(prompt())}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(**inputs, **options)
    for turn in range(2):
        with CakeCache(model, tmp_path / "kv", chunk_size=CHUNK) as cache:
            assert torch.equal(model.generate(**inputs, **options, **given(cache)), plain)
            assert (cache.report.chunks_missed, cache.report.reason == "") == (CHUNKS * (turn == 0), turn == 1)
    assert torch.equal(cake_hf.generate(model, **inputs, **options, store=tmp_path / "kv", chunk_size=CHUNK), plain)
    batch = {name: torch.cat([one, one.flip(1)]) for name, one in inputs.items()}
    with CakeCache(model, tmp_path / "kv", chunk_size=CHUNK, strategy="load") as cache:
        tokens = model.generate(**batch, **options, **given(cache))
        assert torch.equal(tokens, model.generate(**batch, **options))
        assert cache.report.chunks_loaded == CHUNKS


def test_an_offloaded_model_computes_on_its_home_device(tmp_path: Path) -> None:
    plain, cpu = build("llama"), torch.device("cpu")
    for offload in OFFLOADS:
        moved = offload(build("llama"), tmp_path / offload.__name__)
        assert (home_device(moved), devices_of(moved)) == (cpu, [cpu])
        assert where_computed(moved) == "cpu, weights offloaded"
        assert numerics_metadata(moved) == numerics_metadata(plain)
    assert where_computed(plain) == "cpu"


def test_the_innermost_hook_says_where() -> None:
    model = build("llama")
    add = partial(accelerate.hooks.add_hook_to_module, append=True)
    add(model, accelerate.hooks.AlignDevicesHook("cpu", offload=False))
    assert devices_of(model) == [torch.device("cpu")]
    hook = accelerate.hooks.CpuOffload("cpu")
    hook.execution_device = torch.device("xpu", 1)  # never brought there: no forward is run
    add(model, hook)
    assert devices_of(model) == [torch.device("xpu", 1)]


@pytest.mark.parametrize("what", ["", "cudnn.benchmark", "cudnn.deterministic", "order of kernels"])
def test_what_a_gpu_chooses_its_kernels_by_is_among_the_numerics(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions, for one, are chosen by trial if `benchmark` is on. Without a change they are equal."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    model = build("llama")
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook("cpu", place_submodules=True))
    model._hf_hook.execution_device = torch.device("cuda", 0)  # no forward is run
    before = numerics_metadata(model)
    assert before["device"] == "cuda"
    chosen: AbstractContextManager[object] = nullcontext()
    if what == "order of kernels":
        every = [
            SDPBackend.MATH,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
        ]
        chosen = sdpa_kernel(every, set_priority=True)
    elif what:
        monkeypatch.setattr(torch.backends.cudnn, what.split(".")[1], True)
    with chosen:
        assert (numerics_metadata(model) == before) == (not what)


def test_weights_that_no_hook_brings_are_refused(tmp_path: Path) -> None:
    moved = accelerate.cpu_offload(build("llama"))
    accelerate.hooks.remove_hook_from_module(moved, recurse=True)
    moved.model.norm.to("meta")
    with pytest.raises(UnsupportedModel, match="meta"):
        CakeCache(moved, MemoryStore())
