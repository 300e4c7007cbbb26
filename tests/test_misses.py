"""A miss says why: which chunks of the prompt are stored, what they were made with, and what would have to be alike."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from cake_hf import CakeCache, LocalStore, MemoryStore, Report, Store, Tier, TierStore
from cake_hf.stores.differences import between, in_a_sentence
from cake_hf.stores.opening import store_name
from cake_hf.stores.records import MOST_RECORDS
from faulty import Faulty, hanging, raising
from models import CHUNK, CHUNKS, build, difference, expected, prompt, run, shared_model
from store_runs import PATIENT, QUICK, is_right, opened
from vision_models import inputs_for, standard_parts, vision_model
from vision_runs import ask, fill
from waiting import PATIENCE

NONE_YET = "the store has none of the prompt's chunks yet"
WIDE = 2 * CHUNK


def fill_store(model: torch.nn.Module, store: Store, ids: torch.Tensor | None = None, **options: Any) -> Store:
    with CakeCache(model, store, **{"chunk_size": CHUNK, **options}) as cache:
        cache.prefill(prompt() if ids is None else ids)
        assert cache.flush()
    return store


def reason(model: torch.nn.Module, store: Store, ids: torch.Tensor | None = None, **options: Any) -> str:
    """What a prompt that finds nothing is told."""
    with CakeCache(model, store, **{"chunk_size": CHUNK, "save": False, **options}) as cache:
        report = cache.prefill(prompt() if ids is None else ids)
        assert report.chunks_loaded == 0
    return report.reason


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_reason_names_the_difference_and_its_cure() -> None:
    store = fill_store(shared_model("llama"), MemoryStore(), prompt(5 * CHUNK + 3))
    with threads(2):
        told = reason(shared_model("llama"), store, prompt(5 * CHUNK + 3))
    assert told == (
        "5 chunks of this prompt are stored, made with 1 thread; this process has 2: call torch.set_num_threads(1), or use "
        "exact=False on both sides"
    )


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def other_weights(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    return model


def with_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def with_merged_lora(model: Any) -> Any:
    return with_lora(model).merge_and_unload()


def other_rope(model: Any) -> Any:
    model.config.rope_parameters["rope_theta"] = 5000.0
    return model


def scaled_attention(model: Any) -> Any:
    model.model.layers[0].self_attn.scaling *= 1.5
    return model


CHANGED: list[tuple[Callable[[Any], Any], str, str]] = [
    (eager, "attention sdpa; this model has eager", "attn_implementation='sdpa'"),
    (lambda model: model.to(torch.bfloat16), "KV in float32; this model's is in bfloat16", "dtype=torch.float32"),
    (lambda model: model.double(), "KV in float32; this model's is in float64", "dtype=torch.float32"),
    (other_weights, "other weights of LlamaForCausalLM", "load the same revision"),
    (with_lora, "no adapter; this model has one", "unload it"),
    (with_merged_lora, "other weights of LlamaForCausalLM", "with the same adapters"),
    (other_rope, "rope_theta 10000.0; this model has 5000.0", "the same config"),
    (scaled_attention, "a model that computes something else", "patched, steered or edited"),
    (lambda model: build("llama", seed=5), "other weights of LlamaForCausalLM", "load the same revision"),
    (lambda model: build("qwen2"), "another model (LlamaForCausalLM); this one is Qwen2ForCausalLM", "load that model"),
]


@pytest.mark.fault(
    "Model",
    "A prompt was saved by a model with other weights, adapters, attention, dtype or config.",
    "`report.reason` and the log say how many of its chunks are stored, what they were made with, and what to do.",
)
@pytest.mark.parametrize(("change", "differs", "cure"), CHANGED, ids=lambda value: getattr(value, "__name__", None))
def test_another_model_is_told(change: Callable[[Any], Any], differs: str, cure: str) -> None:
    model = build("llama")
    store = fill_store(model, MemoryStore())
    told = reason(change(model), store)
    assert told.startswith(f"{CHUNKS} chunks of this prompt are stored, made with ")
    assert differs in told
    assert cure in told


def test_a_prompt_that_is_told_about_is_generated_from_as_ever() -> None:
    store = fill_store(shared_model("llama"), MemoryStore(), chunk_size=WIDE)
    with opened(store) as cache:
        assert is_right(cache)
        assert cache.report.reason_code == "stored-otherwise"
        assert "made with chunks of" in cache.report.reason
        assert cache.flush()
        assert cache.report.chunks_saved == CHUNKS
        cache.reset()
        assert is_right(cache)
        assert cache.report.reason == ""


def test_an_adapter_that_is_missing_is_told() -> None:
    store = fill_store(with_lora(build("llama")), MemoryStore())
    assert "made with an adapter; this model has none: load the same adapter" in reason(build("llama"), store)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def without_mkldnn() -> Iterator[None]:
    torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(True)


ANOTHER = {"cpu vendor_id": "ACME", "cpu family": "9", "cpu model": "3", "instructions": {"avx": True}}
MACHINES: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: threads(2), "1 thread; this process has 2", "call torch.set_num_threads(1), or use exact=False"),
    (
        lambda: mock.patch("transformers.__version__", "5.0.9"),
        f"transformers {transformers.__version__}; this process has 5.0.9",
        f"install transformers {transformers.__version__}, or use exact=False on both sides",
    ),
    (
        lambda: mock.patch("cake_hf.model.numerics.processor", return_value=ANOTHER),
        "another processor",
        "this one is ACME, family 9, model 3: use exact=False on both sides",
    ),
    (deterministic, "deterministic algorithms off", "torch.use_deterministic_algorithms(False), or use exact=False"),
    (without_mkldnn, "mkldnn", ": use exact=False on both sides"),
    (lambda: torch.autocast("cpu", torch.bfloat16), "autocast off", "the same torch.autocast"),
]


@pytest.mark.fault(
    "Processes",
    "A prompt was saved by a process with other threads, libraries, kernels or another processor.",
    "`report.reason` and the log say what differs; with `exact=False` on both sides it is found.",
)
@pytest.mark.parametrize(
    ("here", "differs", "cure"), MACHINES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_another_machine_is_told(here: Callable[[], Any], differs: str, cure: str) -> None:
    model = shared_model("llama")
    store = fill_store(model, MemoryStore())
    with here():
        told = reason(model, store)
    assert told.startswith(f"{CHUNKS} chunks of this prompt are stored, made with ")
    assert differs in told
    assert cure in told


OPTIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"chunk_size": WIDE}, f"chunks of {CHUNK} tokens; this cache has chunks of {WIDE}: pass chunk_size={CHUNK}"),
    ({"chunk_size": WIDE}, {}, f"chunks of {WIDE} tokens; this cache has chunks of {CHUNK}: pass chunk_size={WIDE}"),
    ({}, {"exact": False}, "exact=True; this cache has exact=False: pass exact=True"),
    ({"exact": False}, {}, "exact=False; this cache has exact=True: pass exact=False"),
    ({"exact": False}, {"exact": False, "chunk_size": WIDE}, f"pass chunk_size={CHUNK}"),
    ({"salt": "a"}, {"salt": "a", "chunk_size": WIDE}, f"pass chunk_size={CHUNK}"),
]


@pytest.mark.parametrize(("there", "here", "told"), OPTIONS, ids=str)
def test_different_options_are_named_in_the_reason(there: dict[str, Any], here: dict[str, Any], told: str) -> None:
    store = fill_store(shared_model("llama"), MemoryStore(), **there)
    assert told in reason(shared_model("llama"), store, **here)


def test_the_same_is_not_advised_twice() -> None:
    lossy, exact = {"codec": {"name": "int4", "version": "1"}}, {"numerics": {"device": "cpu"}}
    assert in_a_sentence(between(lossy, exact, "A", "A")).endswith("exact=True: pass codec='int4'; pass exact=False")


def test_several_differences_are_told_together_and_only_what_helps_is_advised() -> None:
    store = fill_store(shared_model("llama"), MemoryStore())
    with threads(2), mock.patch("cake_hf.model.numerics.processor", return_value=ANOTHER):
        told = reason(shared_model("llama"), store, chunk_size=WIDE)
    assert f"chunks of {CHUNK} tokens, 1 thread and another processor" in told
    assert told.endswith(f": pass chunk_size={CHUNK}; use exact=False on both sides")


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        ({"device": "cuda"}, {"device": "cpu"}, "made with device cuda; this process has device cpu: use exact=False"),
        ({"device": "cuda"}, None, "made with exact=True; this cache has exact=False: pass exact=True if"),
        ({"device": "cpu"}, None, "made with exact=True and other weights of A; here there are exact=False and B: pass exact"),
        ({"device": "cuda"}, {"device": "cuda"}, "made with other weights of A; this model is B: load the same revision"),
        (None, None, "made with other weights of A; this model is B: load the same revision"),
    ],
)  # fmt: skip
def test_checksums_of_weights_are_compared_only_where_they_are_made_alike(
    there: dict[str, str] | None, here: dict[str, str] | None, told: str
) -> None:
    def facts(weights: str, numerics: dict[str, str] | None) -> dict[str, Any]:
        return {"chunk_size": 16, "model": {"weights": weights}, **({} if numerics is None else {"numerics": numerics})}

    assert in_a_sentence(between(facts("a", there), facts("b", here), "A", "B")).startswith(told)


def test_every_difference_is_said_somehow() -> None:
    """Facts that no version knows yet, or that somebody made up."""
    for theirs, ours in (({"layout": {}}, {"layout": {"x": {}}}), ({"parallel": 2}, {}), ({"model": 3}, {"model": []})):
        assert len(in_a_sentence(between(theirs, ours, "A", "B"))) > len("made with ")


def test_the_nearest_of_several_namespaces_is_told() -> None:
    store = fill_store(shared_model("qwen2"), MemoryStore())
    fill_store(shared_model("llama"), store)
    fill_store(build("llama", seed=3), store)
    assert f"pass chunk_size={CHUNK}" in reason(shared_model("llama"), store, chunk_size=WIDE)


def test_only_chunks_that_are_there_are_counted() -> None:
    store = fill_store(shared_model("llama"), MemoryStore())
    shared = torch.cat([prompt()[:, : 2 * CHUNK], prompt(5 * CHUNK, seed=9)], dim=1)
    assert "2 chunks of this prompt are stored" in reason(shared_model("llama"), store, shared, exact=False)
    for key in list(store.keys())[1:]:
        store.delete(key)
    assert "1 chunk of this prompt is stored" in reason(shared_model("llama"), store, exact=False)
    for key in list(store.keys()):
        store.delete(key)
    assert reason(shared_model("llama"), store, exact=False) == NONE_YET


def test_a_prompt_that_was_not_saved_is_told_as_before() -> None:
    store = fill_store(shared_model("llama"), MemoryStore())
    assert reason(shared_model("llama"), store, prompt(seed=7)) == NONE_YET
    assert reason(shared_model("llama"), store, prompt(seed=7), exact=False) == NONE_YET
    assert reason(shared_model("llama"), MemoryStore()) == NONE_YET


@pytest.mark.fault(
    "Secrets",
    "A prompt is looked for under another salt than it was saved under, or under none.",
    "What is said is the same whether the store has that document or another one: nothing about documents.",
)
@pytest.mark.parametrize(("theirs", "mine"), [("tenant", ""), ("tenant", "other"), ("", "other")])
@pytest.mark.parametrize("options", [{}, {"chunk_size": WIDE}, {"exact": False}], ids=str)
def test_another_salt_tells_nothing_about_documents(theirs: str, mine: str, options: dict[str, Any]) -> None:
    with_it = fill_store(shared_model("llama"), MemoryStore(), salt=theirs)
    without_it = fill_store(shared_model("llama"), MemoryStore(), prompt(seed=8), salt=theirs)
    told = {reason(shared_model("llama"), store, salt=mine, **options) for store in (with_it, without_it)}
    assert len(told) == 1
    assert "under another salt" in (said := told.pop())
    assert not re.search(r"\d", said)


def test_no_record_holds_a_salt_or_a_token() -> None:
    store = fill_store(shared_model("llama"), MemoryStore(), salt="a long secret text")
    (note,) = store.notes().values()
    assert b"a long secret text" not in note
    assert json.loads(note)["words"] == {}


@pytest.mark.parametrize("rows", [2, 3])
def test_a_batch_learns_how_its_chunks_were_made(rows: int) -> None:
    model = shared_model("llama")
    ids = torch.cat([prompt(), *(prompt(seed=seed) for seed in range(2, rows + 1))])
    store = MemoryStore()
    for row in ids:
        fill_store(model, store, row[None])
    with CakeCache(model, store, chunk_size=CHUNK, save=False, exact=False) as cache:
        run(model, ids, cache)
        assert "chunks of this prompt are stored, made with exact=True" in cache.report.reason


def test_a_prompt_with_images_is_told_across_chunk_sizes() -> None:
    family = "qwen2_5_vl"
    store, inputs = MemoryStore(), inputs_for(family, standard_parts(family))
    fill(family, store, inputs)
    with CakeCache(vision_model(family), store, chunk_size=2 * CHUNK, save=False) as cache:
        ask(family, cache, inputs)
        assert "chunks of this prompt are stored, made with chunks of" in cache.report.reason
    with CakeCache(vision_model(family), store, chunk_size=2 * CHUNK, save=False) as cache:
        ask(family, cache, inputs_for(family, standard_parts(family), seed=2))
        assert "made with" not in cache.report.reason


def places(root: Path) -> list[tuple[Store, Store]]:
    """Each kind of store twice, as two processes would open it."""
    memory = MemoryStore()
    return [
        (memory, memory),
        (LocalStore(root / "disk"), LocalStore(root / "disk")),
        (
            TierStore([MemoryStore(), LocalStore(root / "tiers")]),
            TierStore([MemoryStore(), LocalStore(root / "tiers")]),
        ),
    ]


@pytest.mark.parametrize("number", range(3), ids=["memory", "directory", "tiers"])
def test_every_kind_of_store_explains_a_miss(tmp_path: Path, number: int) -> None:
    one, other = places(tmp_path)[number]
    fill_store(shared_model("llama"), one)
    assert f"{CHUNKS} chunks of this prompt are stored" in reason(shared_model("llama"), other, exact=False)


def test_a_miss_is_explained_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    model.config._name_or_path = "told-once"
    store = fill_store(model, MemoryStore())
    other_weights(model)
    with caplog.at_level(logging.INFO, "cake_hf"):
        for _ in range(2):
            reason(model, store)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [text for text in told if "chunks of this prompt are stored" in text] == [
        f"A prompt is not found: {CHUNKS} chunks of this prompt are stored, made with other weights of told-once: "
        "load the same revision, with the same adapters and changes."
    ]


# What may go wrong with the record.


def test_a_hit_asks_for_no_records() -> None:
    store = Faulty(fill_store(shared_model("llama"), MemoryStore()), "notes", raising(lambda: OSError("asked")))
    with opened(store, save=False, strategy="load") as cache:
        assert is_right(cache)
        assert (cache.report.chunks_loaded, store.calls) == (CHUNKS, 0)


@pytest.mark.fault(
    "Stores",
    "Records of what chunks were made with cannot be read, or their reading hangs.",
    "The miss is told without them, after 5 seconds or `Limits.lookup_timeout`; the prompt is computed and saved.",
)
@pytest.mark.parametrize("fault", ["OSError", "panic", "hang", "absurd"])
def test_records_that_do_not_come_keep_nothing_up(fault: str) -> None:
    inner = fill_store(shared_model("llama"), MemoryStore(), prompt(seed=4))
    with hanging() as hang:
        faults: dict[str, Callable[[str], Any]] = {
            "OSError": raising(lambda: OSError("no such luck")),
            "panic": raising(KeyboardInterrupt),
            "hang": hang,
            "absurd": lambda _: {"x": 5, 3: None},
        }
        store = Faulty(inner, "notes", faults[fault])
        with opened(store, save=False, limits=QUICK if fault == "hang" else PATIENT) as cache:
            assert is_right(cache)
            assert cache.report.reason == NONE_YET
        assert store.calls == 1


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, RecursionError])
def test_records_that_cannot_be_written_keep_no_chunk_from_being_saved(error: type[BaseException]) -> None:
    store = Faulty(MemoryStore(), "put_note", raising(error))
    with opened(store, limits=PATIENT) as cache:
        assert is_right(cache)
        assert cache.flush()
        assert (cache.report.chunks_saved, cache.report.chunks_unsaved) == (CHUNKS, 0)
    assert store.calls == 1


@pytest.mark.parametrize("method", ["notes", "put_note"])
def test_records_whose_writing_hangs_keep_no_chunk_from_being_saved(method: str) -> None:
    with hanging() as hang:
        store = Faulty(MemoryStore(), method, hang)
        with opened(store, limits=QUICK) as cache:
            assert is_right(cache)
            assert cache.flush(PATIENCE)
            assert (cache.report.chunks_saved, cache.report.chunks_unsaved) == (CHUNKS, 0)


def test_a_record_under_another_name_counts_for_nothing() -> None:
    store = fill_store(shared_model("llama"), MemoryStore())
    ((name, raw),) = store.notes().items()
    store.put_note(name[::-1], raw)
    store.put_note(name, None)
    assert reason(shared_model("llama"), store, exact=False) == NONE_YET


def lied(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def changed(raw: bytes) -> bytes:
        told = json.loads(raw)
        change(told)
        return json.dumps(told).encode()

    return changed


ABSURD: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "no text": lambda raw: b"\xff\xfe" + raw,
    "cut short": lambda raw: raw[: len(raw) // 2],
    "a number": lambda raw: b"17",
    "a list": lambda raw: b"[]",
    "deep": lambda raw: b"[" * 100_000,
    "long": lambda raw: raw + b" " * 2**20,
    "a huge number": lambda raw: raw.replace(f'"chunk_size":{CHUNK}'.encode(), b'"chunk_size":' + b"9" * 5000),
    "no facts": lied(lambda told: told.update(facts=None)),
    "facts of another form": lied(lambda told: told.update(facts=[1, 2])),
    "chunks of nothing": lied(lambda told: told["facts"].update(chunk_size=0)),
    "chunks of less": lied(lambda told: told["facts"].update(chunk_size=-16)),
    "chunks of a truth": lied(lambda told: told["facts"].update(chunk_size=True)),
    "vast chunks": lied(lambda told: told["facts"].update(chunk_size=2**60)),
    "other facts": lied(lambda told: told["facts"]["numerics"].update(threads=7)),
    "numerics of another form": lied(lambda told: told["facts"].update(numerics="many")),
    "a path as namespace": lied(lambda told: told.update(namespace="../../etc/passwd")),
    "dates beyond time": lied(lambda told: told.update(last=10**30)),
    "words of another form": lied(lambda told: told.update(words=[["a", "b"]])),
    "another format": lied(lambda told: told.update(format="something else")),
}


@pytest.mark.fault(
    "Files",
    "A record of what chunks were made with is damaged, absurd, or made up.",
    "It counts as none: the prompt is computed and saved, and a good record takes its place.",
)
@pytest.mark.parametrize("damage", ABSURD.values(), ids=ABSURD)
def test_a_record_that_makes_no_sense_is_none(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    model = shared_model("llama")
    fill_store(model, LocalStore(tmp_path), prompt())
    (file,) = (tmp_path / "notes").glob("namespace-*.json")
    good = json.loads(file.read_bytes())
    file.write_bytes(damage(file.read_bytes()))
    told = reason(model, LocalStore(tmp_path), exact=False)
    assert told.startswith(NONE_YET)
    assert "chunks of this prompt" not in told
    fill_store(model, LocalStore(tmp_path), prompt(seed=3))
    again = json.loads(file.read_bytes())
    assert (again["facts"], again["namespace"]) == (good["facts"], good["namespace"])
    assert f"{CHUNKS} chunks of this prompt are stored" in reason(model, LocalStore(tmp_path), exact=False)


def test_what_a_record_says_cannot_forge_a_line() -> None:
    model = shared_model("llama")
    store = fill_store(model, MemoryStore())
    ((name, raw),) = store.notes().items()
    store.put_note(name, lied(lambda told: told.update(model="\x1b[31mA\nB" + "x" * 9999))(raw))
    told = reason(build("llama", seed=2), store)
    assert told.isprintable()
    assert len(told) < 500


def test_links_and_pipes_among_the_records_are_left_alone(tmp_path: Path) -> None:
    fill_store(shared_model("llama"), LocalStore(tmp_path / "store"))
    notes = tmp_path / "store" / "notes"
    (file,) = notes.glob("namespace-*.json")
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    assert reason(shared_model("llama"), LocalStore(tmp_path / "store"), exact=False) == NONE_YET


def test_there_are_never_more_than_so_many_records() -> None:
    store, ids = MemoryStore(), prompt(CHUNK + 1)
    for number in range(MOST_RECORDS + 5):
        fill_store(shared_model("llama"), store, ids, salt=str(number))
    assert len(store.notes()) == MOST_RECORDS


def test_looking_leaves_no_record(tmp_path: Path) -> None:
    fill_store(shared_model("llama"), LocalStore(tmp_path))
    for file in (tmp_path / "notes").iterdir():
        file.unlink()
    with opened(tmp_path, save=False, strategy="load") as cache:
        assert is_right(cache)
    assert list((tmp_path / "notes").iterdir()) == []


# What the report says besides.


def test_the_report_names_the_store_and_its_bytes(tmp_path: Path) -> None:
    def on_disk() -> int:
        return sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))

    with opened(tmp_path) as cold:
        assert is_right(cold)
        assert cold.flush()
        assert cold.report.store == tmp_path.name
        assert cold.report.bytes_stored == on_disk() > 0
        assert cold.report.seconds_saved is None
    with opened(tmp_path, strategy="load") as warm:
        assert is_right(warm)
        assert warm.report.bytes_stored == on_disk()
        assert f"{tmp_path.name}: " in str(warm.report)
        assert str(tmp_path) not in str(warm.report)


def test_the_report_says_what_loading_saved_once_costs_are_known(tmp_path: Path) -> None:
    with opened(tmp_path) as cold:
        for _ in range(2):  # the first measurement of a process is left out
            assert is_right(cold)
            assert cold.flush()
            cold.reset()
            for key in list(cold.store.keys()):
                cold.store.delete(key)
        assert is_right(cold)
        assert cold.flush()
    with opened(tmp_path, strategy="load") as warm:
        assert is_right(warm)
        assert warm.report.chunks_loaded == CHUNKS
        assert isinstance(warm.report.seconds_saved, float)
        assert "than computing all" in str(warm.report)
        json.dumps(warm.report.as_dict(), allow_nan=False)


def test_the_report_says_if_no_cost_is_known() -> None:
    assert "what was saved is not known" in str(Report(chunks_loaded=3))
    assert "saved is not known" not in str(Report(chunks_computed=3))
    assert "0.250 s more than computing all" in str(Report(chunks_loaded=3, seconds_saved=-0.25))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (lambda root: "memory:1GB", "memory:1GB"),
        (lambda root: MemoryStore(), "MemoryStore"),
        (lambda root: root / "kv", "kv"),
        (lambda root: f"{root}/kv/", "kv"),
        (lambda root: f"file://{root}/kv?budget=1GB", "kv"),
        (lambda root: LocalStore(root / "kv"), "kv"),
        (lambda root: ["memory:1GB", [root / "one", LocalStore(root / "two")]], "memory:1GB, one, two"),
        (lambda root: [Tier(MemoryStore()), str(root / "far")], "MemoryStore, far"),
    ],
)
def test_a_store_is_named_without_the_way_to_it(spec: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    with opened(spec(tmp_path)) as cache:
        cache.prefill(prompt(CHUNK + 1))
        assert cache.report.store == name


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("redis://user:secret@host:6379/0", "redis://host:6379/0"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("pack:/home/somebody/pack", "pack:pack"),
        ("hf://org/pack", "hf://org/pack"),
    ],
)
def test_a_store_elsewhere_is_named_without_secrets(spec: str, name: str) -> None:
    assert store_name(spec) == name


def test_a_store_of_the_users_is_not_asked_how_it_looks() -> None:
    class Own(MemoryStore):
        def __repr__(self) -> str:
            raise OSError("not now")

    with opened(Own()) as cache:
        assert difference(run(shared_model("llama"), prompt(), cache), expected()) == ""
        assert cache.report.store == "Own"
