"""Batches: each row is restored as if it were alone; cold and warm runs of one batch are bit for bit equal."""

from __future__ import annotations

import itertools
import threading
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import cake_hf
from cake_hf import CakeCache, Limits, MemoryStore, reads_only
from cake_hf.chunks.codec import parse_header
from cake_hf.layers import token_major as layers
from cake_hf.restore.bound_model import BoundModel
from cake_hf.testing import FaultStore
from hanging import no_waiting_for
from models import CHUNK, DTYPES, FAMILIES, build, difference, oracle, prompt, run, shared_model
from naming import cache_of, given
from waiting import PATIENCE, join_loaders

LENGTHS = (70, 83, 9, 4 * CHUNK, 70, 1, CHUNK + 1)
"""Tokens of each row: rows 0 and 4 are equal; some are shorter than a chunk, one ends with a full chunk."""
CHUNKS = [(length - 1) // CHUNK for length in LENGTHS]
DISTINCT = sum(CHUNKS) - CHUNKS[4]
"""Chunks of all rows, with those of equal rows once."""
NEW_TOKENS = 8


def row(number: int) -> torch.Tensor:
    return prompt(LENGTHS[number], seed=0 if number == 4 else number)


def padded(rows: list[torch.Tensor], side: str = "left", width: int = 0) -> dict[str, torch.Tensor]:
    """Ids and mask of a batch."""
    width = max([width, *(ids.shape[1] for ids in rows)])
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, tokens in enumerate(rows):
        length = tokens.shape[1]
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[number, place], mask[number, place] = tokens[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def batch() -> dict[str, torch.Tensor]:
    return padded([row(number) for number in range(len(LENGTHS))])


def generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor], used: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(**inputs, **given(used), return_dict_in_generate=True, output_logits=True, **options)


def plainly(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return generate(model, inputs, DynamicCache(config=model.config), **options)


def equal(one: Any, other: Any) -> bool:
    """Tokens and logits, bit for bit."""
    return torch.equal(one.sequences, other.sequences) and all(
        torch.equal(*pair) for pair in zip(one.logits, other.logits, strict=True)
    )


@cache
def cold_run(family: str = "llama", dtype: str = "float32", attention: str = "sdpa") -> tuple[MemoryStore, Any]:
    """What the first run gives, and what it stores."""
    store = MemoryStore()
    with CakeCache(shared_model(family, dtype, attention), store, chunk_size=CHUNK) as used:
        result = generate(shared_model(family, dtype, attention), batch(), used)
        assert (used.report.chunks_computed, used.report.chunks_shared) == (DISTINCT, CHUNKS[4])
    return store, result


@pytest.mark.parametrize(("family", "dtype", "attention"), list(itertools.product(FAMILIES, DTYPES, ("eager", "sdpa"))))
def test_cold_and_warm_are_equal(family: str, dtype: str, attention: str) -> None:
    model = shared_model(family, dtype, attention)
    store, cold = cold_run(family, dtype, attention)
    for strategy in ("load", "both"):
        with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy, save=False) as used:
            assert equal(generate(model, batch(), used), cold)
            report = used.report
            assert (report.batch, report.tokens, report.chunks_missed) == (len(LENGTHS), sum(LENGTHS), 0)
            assert report.chunks_loaded + report.chunks_computed == DISTINCT
            assert strategy == "both" or report.chunks_loaded == DISTINCT
            assert report.reason == ""
            assert "7 prompts" in str(report)
    if dtype == "float32":
        assert torch.equal(cold.sequences, plainly(model, batch()).sequences)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_each_rows_chunks_are_those_of_the_row_alone(family: str, dtype: str) -> None:
    """In the cache, bit for bit; and in the store, name by name and byte by byte."""
    model, alone = shared_model(family, dtype), MemoryStore()
    store, cold = cold_run(family, dtype)
    width = max(LENGTHS)
    for number, length in enumerate(LENGTHS):
        with CakeCache(model, alone, chunk_size=CHUNK) as used:
            used.prefill(row(number)[:, :-1], whole=True)
            tokens, pad = used.get_seq_length(), width - length
            assert tokens == CHUNKS[number] * CHUNK
            for layer, own in zip(cache_of(cold).layers, used.layers, strict=True):
                if tokens:
                    assert torch.equal(layer.keys[number, :, pad : pad + tokens], own.keys[0])
                    assert torch.equal(layer.values[number, :, pad : pad + tokens], own.values[0])
    for layer in cache_of(cold).layers:
        assert not layer.keys[5, :, : width - CHUNK].any(), "what is masked holds zeros"
        assert layer.keys.isfinite().all()
        assert layer.values.isfinite().all()
    assert {key: store.read(key) for key in store.keys()} == {key: alone.read(key) for key in alone.keys()}  # noqa: SIM118


def test_a_batch_serves_single_prompts_and_they_serve_it() -> None:
    model, (store, cold) = shared_model("llama"), cold_run()
    for number in (1, 3):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load", save=False) as used:
            assert difference(run(model, row(number), used), oracle(model, row(number))) == ""
            assert used.report.chunks_loaded == CHUNKS[number]
    singles = MemoryStore()
    for number in range(len(LENGTHS)):
        with CakeCache(model, singles, chunk_size=CHUNK) as used:
            used.prefill(row(number)[:, :-1], whole=True)
    with CakeCache(model, singles, chunk_size=CHUNK, strategy="load") as used:
        assert equal(generate(model, batch(), used), cold)
        assert used.report.chunks_loaded == DISTINCT


def test_other_rows_in_another_order_change_no_row() -> None:
    """A row's restored KV does not depend on the rows beside it."""
    model = shared_model("llama")
    used = CakeCache(model, cold_run()[0], chunk_size=CHUNK, save=False)
    generate(model, padded([row(6), row(1)], width=100), used)
    for layer, first in zip(used.layers, cache_of(cold_run()[1]).layers, strict=True):
        chunks = CHUNKS[1] * CHUNK
        assert torch.equal(layer.keys[1, :, 100 - 83 : 100 - 83 + chunks], first.keys[1, :, :chunks])
    used.close()


def test_a_prefix_common_to_rows_is_restored_once() -> None:
    """One document and several questions: the document's chunks are computed, or loaded, for one row only."""
    model, store, document = shared_model("llama"), MemoryStore(), prompt(4 * CHUNK + 3)
    rows = [torch.cat([document, prompt(more, seed=more)], dim=1) for more in (5, 2 * CHUNK, 11)]
    once = 4 + 2
    results = []
    for _ in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as used:
            results.append(generate(model, padded(rows), used))
            report = used.report
            assert report.chunks_shared == 2 * 4
            assert report.chunks_loaded + report.chunks_computed == once
    assert report.chunks_loaded == once
    assert equal(*results)
    assert torch.equal(results[0].sequences, plainly(model, padded(rows)).sequences)


@pytest.mark.parametrize("missing", range(0, DISTINCT, 3))
def test_missing_chunks_are_computed(missing: int) -> None:
    model, (full, cold), store = shared_model("llama"), cold_run(), MemoryStore()
    for key in sorted(full.keys()):
        store.write(key, [full.read(key) or b""])
    gone = sorted(store.keys())[missing]
    store.delete(gone)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as used:
        assert equal(generate(model, batch(), used), cold)
        assert (used.report.chunks_loaded, used.report.chunks_missed) == (DISTINCT - 1, 1)
        assert used.flush(60)
    assert store.read(gone) == full.read(gone)


@pytest.mark.parametrize("fault", ["flip", "error", "stall"])
@pytest.mark.parametrize("index", [0, 3])
def test_faults_change_no_bit(fault: str, index: int) -> None:
    """A chunk of several rows' beginning, and one further back. A read that hangs may write wherever it was told to, later."""
    model, (full, cold) = shared_model("llama"), cold_run()
    keys = [key for key in full.keys() if parse_header(full.read(key) or b"")[0].index == index]  # noqa: SIM118
    store = FaultStore(full, dict.fromkeys(keys, fault))
    limits = Limits(loader_threads=2, read_timeout=PATIENCE, lookup_timeout=PATIENCE)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load", save=False, limits=limits) as used:
        with no_waiting_for(store):
            result = generate(model, batch(), used)
        assert equal(result, cold)
        assert used.report.chunks_failed >= 1
        before = [layer.keys.clone() for layer in used.layers]
        store.release()
        join_loaders()
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(used.layers, before, strict=True))


def test_a_batch_makes_its_namespace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for in all of the model's weights, which takes milliseconds."""
    made: list[str] = []
    real = BoundModel.namespace

    def namespace(bound: BoundModel, ids: torch.Tensor | None = None) -> str:
        made.append(real(bound, ids))
        return made[-1]

    monkeypatch.setattr(BoundModel, "namespace", namespace)
    model, (store, cold) = shared_model("llama"), cold_run()
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load", save=False) as used:
        assert equal(generate(model, batch(), used), cold)
        assert used.report.chunks_loaded == DISTINCT
    assert len(made) == 1


def test_rows_are_filled_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a row nor the batch is copied on the way, as long as nothing hangs: only equal chunks are, from row to row."""
    copied: list[torch.Size] = []
    real = layers._room_for

    def room_for(content: torch.Tensor, capacity: int, *, head_major: bool = False) -> torch.Tensor:
        copied.extend([content.shape] * bool(content.numel() and not head_major))  # by head: for decoding, later
        return real(content, capacity, head_major=head_major)

    model, (store, cold) = shared_model("llama"), cold_run()
    monkeypatch.setattr(layers, "_room_for", room_for)
    for strategy in ("load", "both", "compute"):
        with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy, save=False) as used:
            assert equal(generate(model, batch(), used), cold)
    assert copied == []


def test_a_padded_prompt_is_a_batch_of_one() -> None:
    model, store = shared_model("llama"), MemoryStore()
    inputs = padded([row(1)], width=100)
    results = []
    for turn in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as used:
            results.append(generate(model, inputs, used))
            assert used.report.chunks_loaded == turn * CHUNKS[1]
    assert equal(*results)
    assert torch.equal(results[0].sequences, plainly(model, inputs).sequences)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load", save=False) as used:
        assert difference(run(model, row(1), used), oracle(model, row(1))) == ""
        assert used.report.chunks_loaded == CHUNKS[1]


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 3, "do_sample": True}])
def test_rows_that_are_expanded_are_restored_once(options: dict[str, Any]) -> None:
    model, inputs = shared_model("llama"), padded([row(0), row(1), row(6)])
    times = max(int(value) for value in options.values())
    chunks = CHUNKS[0] + CHUNKS[1] + CHUNKS[6]
    with CakeCache(model, cold_run()[0], chunk_size=CHUNK, strategy="load", save=False) as used:
        result = generate(model, inputs, used, **options)
        assert (used.report.chunks_loaded, used.report.chunks_shared) == (chunks, (times - 1) * chunks)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK, strategy="compute", save=False) as used:
        assert equal(generate(model, inputs, used, **options), result)
    assert torch.equal(result.sequences, plainly(model, inputs, **options).sequences)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_are_one_that_is_repeated(dtype: str) -> None:
    """Each row's KV is that of the row alone, and what comes after it is the same, cold and warm."""
    model, store, results = shared_model("llama", dtype), MemoryStore(), []
    inputs = {"input_ids": row(1).repeat(3, 1)}
    for turn in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as used:
            results.append(generate(model, inputs, used, num_return_sequences=2, do_sample=True))
            report, chunks = used.report, CHUNKS[1]
            assert (report.batch, report.tokens) == (6, 6 * LENGTHS[1])
            assert (report.chunks_loaded, report.chunks_shared) == (turn * chunks, 5 * chunks)
            first = oracle(model, row(1))
            for layer, keys in zip(used.layers, first.keys, strict=True):
                assert torch.equal(layer.keys[:, :, : chunks * CHUNK], keys[:, :, : chunks * CHUNK].repeat(6, 1, 1, 1))
    assert equal(*results)
    if dtype == "float32":
        plain = plainly(model, inputs, num_return_sequences=2, do_sample=True)
        assert torch.equal(plain.sequences, results[0].sequences)


def test_several_batches_at_the_same_time() -> None:
    """They share reads and chunks in any order of rows, and no row waits for ever."""
    model, store, results = shared_model("llama"), MemoryStore(), {}
    orders = [(0, 1, 6), (6, 1, 0), (1, 0), (0,)]

    def ask(number: int) -> None:
        with CakeCache(model, store, chunk_size=CHUNK) as used:
            results[number] = generate(model, padded([row(one) for one in orders[number]]), used)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number, order in enumerate(orders):
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as used:
            assert equal(generate(model, padded([row(one) for one in order]), used), results[number])


def test_in_inference_mode_and_out_of_it() -> None:
    model, (store, cold) = shared_model("llama"), cold_run()
    with CakeCache(model, store, chunk_size=CHUNK, save=False) as used:
        for inside in (True, False, True):
            used.reset()
            with torch.inference_mode(inside):
                assert equal(generate(model, batch(), used), cold)


def test_generate_function() -> None:
    model, (store, cold) = shared_model("llama"), cold_run()
    result = cake_hf.generate(
        model, **batch(), store=store, chunk_size=CHUNK, strategy="load", max_new_tokens=NEW_TOKENS, do_sample=False,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert equal(result, cold)
    assert cache_of(result).report.chunks_loaded == DISTINCT


def test_without_padding_or_mask() -> None:
    model, ids = shared_model("llama"), torch.cat([prompt(50, seed=1), prompt(50, seed=2)])
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as used, torch.no_grad():
        logits = model(ids, **given(used), logits_to_keep=1).logits
        assert used.report.chunks_computed == 2 * 3
    with torch.no_grad():
        plain = model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(logits, plain)


@pytest.mark.parametrize("keep", [1, 5, 2 * CHUNK])
def test_more_logits_than_one(keep: int) -> None:
    model = shared_model("llama")
    inputs = batch()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as used, torch.no_grad():
        logits = model(**inputs, position_ids=positions, **given(used), logits_to_keep=keep).logits
        assert used.report.chunks_computed
        plain = model(**inputs, position_ids=positions, logits_to_keep=keep).logits
    kept = inputs["attention_mask"][:, -keep:].bool()
    assert logits.shape == plain.shape
    torch.testing.assert_close(logits[kept], plain[kept])


def refused(inputs: dict[str, Any], **more: Any) -> str:
    """The reason why a batch is left as it is; also checks that it is."""
    model = shared_model("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as used, torch.no_grad():
        result = model(**inputs, **more, **given(used), logits_to_keep=1).logits
        assert torch.equal(result, model(**inputs, **more, **given(DynamicCache()), logits_to_keep=1).logits)
        assert used.report.chunks_computed == 0
        return used.report.reason


def test_a_plainly_computed_batch_has_a_reason() -> None:
    rows = [row(0), row(1)]
    right = padded(rows, side="right")
    assert "pad on the left" in refused(right, position_ids=(right["attention_mask"].cumsum(-1) - 1))
    assert "positions" in refused(padded(rows)), "a model that is told no positions counts the padding"
    assert "positions" in refused({"input_ids": prompt(40).repeat(2, 1)}, position_ids=torch.arange(3, 43)[None])
    holes = padded(rows)
    holes["attention_mask"][0, 40] = 0
    assert "padding behind tokens" in refused(holes)
    assert "no prompt of the batch" in refused({"input_ids": prompt(CHUNK).repeat(2, 1)})
    square = torch.ones(2, 1, 40, 40).tril().bool()
    assert "form of its own" in refused({"input_ids": prompt(40).repeat(2, 1), "attention_mask": square})
    with CakeCache(shared_model("llama"), MemoryStore(), chunk_size=CHUNK) as used:
        assert used.prefill(prompt().repeat(2, 1)).reason_code == "batch-prefill"
        assert used.get_seq_length() == 0


def test_a_right_padded_batch_gives_what_it_gives_plainly() -> None:
    inputs = padded([row(0), row(1), row(2)], side="right")
    with CakeCache(shared_model("llama"), MemoryStore(), chunk_size=CHUNK) as used:
        assert equal(generate(shared_model("llama"), inputs, used), plainly(shared_model("llama"), inputs))
        assert used.report.reason_code == "right-padding"


def test_the_next_turn_of_a_batch_goes_on_plainly() -> None:
    model, sequences = shared_model("llama"), []
    inputs = padded([row(0), row(1), row(2)])
    for used in (DynamicCache(config=model.config), CakeCache(model, MemoryStore(), chunk_size=CHUNK)):
        first = generate(model, inputs, used).sequences
        ids = torch.cat([first, prompt(21, seed=5).repeat(3, 1)], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW_TOKENS + 21, dtype=torch.long)], dim=1)
        sequences.append(generate(model, {"input_ids": ids, "attention_mask": mask}, used).sequences)
    assert torch.equal(*sequences)
    assert isinstance(used, CakeCache)
    assert used.report.reason_code == "batch-continues"
    used.close()


def test_after_reset_a_cache_takes_another_number_of_rows() -> None:
    model, (store, cold) = shared_model("llama"), cold_run()
    with CakeCache(model, store, chunk_size=CHUNK, save=False) as used:
        generate(model, padded([row(0), row(1)]), used)
        used.reset()
        assert equal(generate(model, batch(), used), cold)
        used.reset()
        assert difference(run(model, row(1), used), oracle(model, row(1))) == ""
        used.crop(-used.get_seq_length())
        assert equal(generate(model, batch(), used), cold)
        used.crop(-used.get_seq_length())
        assert difference(run(model, row(1), used), oracle(model, row(1))) == ""


def test_a_forward_that_fails_leaves_the_cache_empty() -> None:
    model, (store, cold) = build("llama"), cold_run()
    calls = 0

    def fail(module: torch.nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise RuntimeError("on purpose")

    handle = model.model.layers[1].register_forward_pre_hook(reads_only(fail))
    equal_rows, chunks = {"input_ids": row(1).repeat(2, 1)}, CHUNKS[1]
    # In a row's chunk, and in the last pieces.
    for inputs, failing in ((batch(), 2), (batch(), DISTINCT + 1), (equal_rows, 2), (equal_rows, chunks + 1)):
        calls = 0
        with CakeCache(model, store, chunk_size=CHUNK, strategy="compute", save=False) as used:
            used._session.bound_model.layout()  # runs the model once
            calls = 0
            with pytest.raises(RuntimeError, match="on purpose"):
                generate(model, inputs, used)
            assert calls == failing
            assert used.get_seq_length() == 0
            assert equal(generate(model, batch(), used), cold)
    handle.remove()


@pytest.mark.parametrize("size", [CHUNK, 3 * CHUNK + 5, 1000])
def test_the_users_own_prefill_chunk_size(size: int) -> None:
    """Only the first piece starts from an empty cache; a row may have nothing but padding in it."""
    model = shared_model("llama")
    plain = plainly(model, batch(), prefill_chunk_size=size)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as used:
        assert torch.equal(generate(model, batch(), used, prefill_chunk_size=size).sequences, plain.sequences)
