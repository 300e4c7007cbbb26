"""Law 4: a key covers all that changes KV. What differs must miss; what does not must hit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cake_hf import CakeCache, MemoryStore
from cake_hf.model import numerics
from cake_hf.model.behaviour import remember_rows, rows_changed
from cake_hf.model.fingerprint import _device_digest, weights_digest
from models import CHUNK, CHUNKS, build, difference, oracle, prompt, run, shared_model


def loaded(model: torch.nn.Module, store: MemoryStore, **options: object) -> int:
    """How many chunks of the prompt the model finds; also checks its logits against the oracle."""
    settings = {"chunk_size": CHUNK, "save": False, "strategy": "load", **options}
    with CakeCache(model, store, **settings) as cache:  # type: ignore[arg-type]
        run(model, prompt(), cache)
        return cache.report.chunks_loaded


def filled(model: torch.nn.Module, **options: object) -> MemoryStore:
    store = MemoryStore()
    with CakeCache(model, store, **{"chunk_size": CHUNK, **options}) as cache:  # type: ignore[arg-type]
        cache.prefill(prompt())
    return store


def nudge_one_weight(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        next(model.parameters())[5, 5] += 1e-3
    return model


def nudge_through_data(model: torch.nn.Module) -> torch.nn.Module:
    """As merging an adapter does: the version counter sees nothing of it."""
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data += 1e-4 * torch.randn_like(weight)
    return model


def replace_a_weight(model: torch.nn.Module) -> torch.nn.Module:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone() * 1.001)
    return model


def attach_lora(model: torch.nn.Module) -> torch.nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def change_rope(model: torch.nn.Module) -> torch.nn.Module:
    model.config.rope_parameters["rope_theta"] = 5000.0
    return model


def other_attention(model: torch.nn.Module) -> torch.nn.Module:
    model.set_attn_implementation("eager")
    return model


CHANGES: list[Callable[[torch.nn.Module], torch.nn.Module]] = [
    nudge_one_weight,
    nudge_through_data,
    replace_a_weight,
    attach_lora,
    change_rope,
    other_attention,
    lambda model: model.to(torch.bfloat16),
    lambda model: model.double(),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_misses(change: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """On the very same model object, whose checksum is remembered: the change must be noticed."""
    model = build("llama")
    store = filled(model)
    assert loaded(model, store) == CHUNKS
    changed = change(model)
    assert loaded(changed, store) == 0


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_within_one_cache_is_noticed(change: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """Also between two prompts of one cache; and the second prompt's result is right."""
    model = build("llama")
    store = filled(model)
    with CakeCache(model, store, chunk_size=CHUNK, save=False, strategy="load") as cache:
        run(model, prompt(), cache)
        assert cache.report.chunks_loaded == CHUNKS
        changed = change(model)
        cache.reset()
        outcome = run(changed, prompt(), cache)
        assert cache.report.chunks_loaded == 0
    assert difference(outcome, oracle(changed, prompt())) == ""


@pytest.mark.parametrize(
    "options", [{"salt": "tenant"}, {"chunk_size": 2 * CHUNK}, {"exact": False}], ids=["salt", "chunk_size", "exact"]
)
def test_a_cache_with_other_settings_misses(options: dict[str, object]) -> None:
    assert loaded(shared_model("llama"), filled(shared_model("llama")), **options) == 0


def test_a_process_with_other_kernels_misses() -> None:
    model = build("llama", "bfloat16")
    store = filled(model)
    torch.backends.mkldnn.set_flags(False)
    try:
        assert loaded(model, store) == 0
    finally:
        torch.backends.mkldnn.set_flags(True)
    assert loaded(model, store) == CHUNKS


def test_another_processor_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch calls both the same: kernels for AVX-512 and for AMX round differently."""
    model = build("llama")
    exact, inexact = filled(model), filled(model, exact=False)
    monkeypatch.setattr("cake_hf.model.numerics.processor", lambda: {"cpu model": "another"})
    assert loaded(model, exact) == 0
    assert loaded(model, inexact, exact=False) == CHUNKS


@pytest.fixture
def fresh_variables() -> Iterator[Callable[[], None]]:
    """Variables are read once per process; this makes it a new one."""
    yield numerics._variables.cache_clear
    numerics._variables.cache_clear()


@pytest.mark.parametrize("variable", ["MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE"])
def test_libraries_that_are_told_to_round_otherwise_miss(
    variable: str, monkeypatch: pytest.MonkeyPatch, fresh_variables: Callable[[], None]
) -> None:
    model = build("llama")
    store = filled(model)
    with monkeypatch.context() as changed:
        changed.setenv(variable, "COMPATIBLE")
        assert loaded(model, store) == CHUNKS  # too late: the libraries have looked at it already
        fresh_variables()
        assert loaded(model, store) == 0
    fresh_variables()
    assert loaded(model, store) == CHUNKS


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has no such setting")
@pytest.mark.parametrize("where", ["matmul", "conv"])
def test_another_precision_set_in_torchs_new_way_misses(where: str) -> None:
    """From then on torch refuses to say it in the old way: that must not end in an error."""
    model = build("llama")
    store = filled(model)
    setting = getattr(torch.backends.mkldnn, where)
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        assert loaded(model, store) == 0
    finally:
        setting.fp32_precision = before
    assert loaded(model, store) == CHUNKS


@contextmanager
def precision_as_of_old(precision: str) -> Iterator[None]:
    """Where torch knows the new way, the old one sets that, too, and does not set it back to "as always"."""
    parts = [getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul]
    newer: list[Any] = [part for part in parts if hasattr(part, "fp32_precision")]
    before, said = torch.get_float32_matmul_precision(), [part.fp32_precision for part in newer]
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for part, value in zip(newer, said, strict=True):
            part.fp32_precision = value


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_another_precision_set_in_torchs_old_way_misses(precision: str) -> None:
    model = build("llama")
    store = filled(model)
    with precision_as_of_old(precision):
        assert loaded(model, store) == 0
    assert loaded(model, store) == CHUNKS


def test_other_threads_miss_unless_inexact() -> None:
    model = shared_model("llama")
    exact, inexact = filled(model), filled(model, exact=False)
    torch.set_num_threads(2)
    try:
        assert loaded(model, exact) == 0
        assert loaded(model, inexact, exact=False) == CHUNKS
    finally:
        torch.set_num_threads(1)


def test_autocast_misses() -> None:
    model = shared_model("llama")
    store = filled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loaded(model, store) == 0


def test_rounded_frequencies_miss() -> None:
    """`model.to(bfloat16)` rounds them, loading in bfloat16 does not; the weights are the same."""
    loaded_so, cast = build("llama", "bfloat16"), build("llama", "bfloat16")
    loaded_so.model.rotary_emb.inv_freq = build("llama").model.rotary_emb.inv_freq
    assert weights_digest(loaded_so) == weights_digest(cast)
    assert difference(oracle(loaded_so, prompt()), oracle(cast, prompt())) != ""
    store = filled(cast)
    assert loaded(cast, store) == CHUNKS
    assert loaded(loaded_so, store) == 0


def test_a_prompt_with_other_tokens_misses() -> None:
    store = filled(shared_model("llama"))
    ids = prompt()
    ids[0, 0] += 1
    with CakeCache(shared_model("llama"), store, chunk_size=CHUNK, save=False) as cache:
        run(shared_model("llama"), ids, cache)
        assert cache.report.chunks_loaded == 0


def test_the_same_content_hits_whatever_its_name_and_object() -> None:
    store = filled(build("llama"))
    twin = build("llama")
    twin.config._name_or_path = "somebody/elses-copy"
    assert loaded(twin, store) == CHUNKS


def test_lora_gives_a_namespace_of_its_own_that_hits() -> None:
    model = attach_lora(build("llama")).eval()
    store = filled(model)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        outcome = run(model, prompt(), cache)
        assert cache.report.chunks_loaded == CHUNKS
    assert difference(outcome, oracle(model, prompt())) == ""
    with model.disable_adapter():
        assert loaded(model, store) == 0


def test_switched_off_and_on_again_an_adapter_is_itself() -> None:
    model = attach_lora(build("llama")).eval()
    store = filled(model)
    with model.disable_adapter():
        pass
    assert loaded(model, store) == CHUNKS


def test_digest_is_made_once_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import cake_hf.model.fingerprint as fingerprint

    model = build("llama")
    first = weights_digest(model)
    monkeypatch.setattr(fingerprint, "host_bytes", lambda tensor: pytest.fail("hashed again"))
    assert weights_digest(model) == first


def test_digest_covers_names_shapes_and_every_bit() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        return weights_digest(module)

    base = torch.arange(12.0)
    assert digest(a=base) == digest(a=base.clone())
    assert digest(a=base) != digest(b=base)
    assert digest(a=base) != digest(a=base.view(3, 4))
    assert digest(a=base) != digest(a=base.flip(0))
    for place in range(12):
        other = base.clone()
        other[place] = -other[place]
        assert digest(a=base) != digest(a=other)


def test_the_checksum_for_devices_sees_every_word() -> None:
    """The arithmetic that runs on a GPU, here on the CPU."""
    words = torch.randint(-(2**62), 2**62, (3 * 2**15 + 5,))
    digest = _device_digest(words)
    assert digest == _device_digest(words.clone())
    for place in (0, 1, 2**15 - 1, 2**15, words.numel() - 1):
        other = words.clone()
        other[place] ^= 1
        assert _device_digest(other) != digest
    swapped = words.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert _device_digest(swapped) != digest


@pytest.mark.parametrize("nbytes", [0, 1, 8 * 2**15 - 1, 8 * 2**15, 8 * 2**15 + 1, 3 * 8 * 2**15])
def test_the_checksum_for_devices_fills_up_the_last_row(nbytes: int) -> None:
    """And only that is copied. What does not begin at a word is, too."""
    content = torch.randint(0, 256, (nbytes + 1,), dtype=torch.uint8)
    filled = torch.nn.functional.pad(content[:nbytes], (0, -nbytes % (8 * 2**15)))
    assert _device_digest(content[:nbytes]) == _device_digest(filled)
    assert _device_digest(content[1:]) == _device_digest(content[1:].clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 8, 65])
def test_any_edit_of_a_row_of_the_embedding_is_seen(dtype: torch.dtype, width: int) -> None:
    """Also where a row is no whole number of 64-bit words; and only prompts with that token are asked to look closer."""
    embedding = torch.nn.Embedding(7, width, dtype=dtype)
    model: Any = torch.nn.Sequential(embedding)
    model.get_input_embeddings = lambda: embedding
    remember_rows(model)
    weight = embedding.weight.data
    for place in range(width):
        before = weight[3, place].clone()
        weight[3, place] += 1
        assert rows_changed(model, torch.tensor([[1, 3]]))
        assert not rows_changed(model, torch.tensor([[1, 2, 4]]))
        weight[3, place] = before
    assert not rows_changed(model, torch.tensor([[1, 3]]))
    weight[5] = weight[5].flip(0) + 1
    assert rows_changed(model, torch.tensor([[5]]))
