"""Caches with a lossy codec: another output than without, and the same one wherever each chunk came from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import cake_hf
from cake_hf import CakeCache, CakeError, Limits, LocalStore, MemoryStore, Store, StoreError, TierStore, reads_only
from cake_hf.chunks.encoded_header import is_encoded, parse_encoded_header
from cake_hf.chunks.lossy import LOSSY
from cake_hf.model.kv_layout import kv_template
from cake_hf.testing import FaultStore, GateStore, WrapperStore
from families import family_model, here
from family_runs import IDS as FAMILY_IDS
from family_runs import difference as family_difference
from family_runs import generate
from lossy_runs import NAMES, prefilled
from models import CHUNK, CHUNKS, TAIL, Outcome, difference, oracle, prompt, run, shared_model
from stored import chunks_of
from waiting import join_loaders


class ChunkGate(GateStore):
    """Only chunks wait at the gate, not what the store keeps of the model, which inexact caches read first."""

    def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
        chunks = {
            parse_encoded_header(value)[0].facts.key for value in chunks_of(self.inner).values() if is_encoded(value)
        }
        return super().read_into(key, parts) if key in chunks else self.inner.read_into(key, parts)


@contextmanager
def chunks_meet_at(model: Any, gate: GateStore, meeting: int) -> Iterator[None]:
    """As `meeting_at`; but only chunks count, since an inexact cache tries its model first."""
    count = 0

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        count += kwargs["input_ids"].shape[1] == CHUNK
        if count == meeting:
            gate.open(CHUNKS - meeting)
            gate.await_begun(CHUNKS - meeting + 1)

    handle = model.register_forward_pre_hook(reads_only(hook), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        gate.open()
        join_loaders()


ONE_LOADER = Limits.from_environment(loader_threads=1)
RUNS = [pytest.param(*name.values, "llama", "bfloat16", marks=name.marks) for name in NAMES] + [
    (name, *model) for name in ("near", "int4", "rot4") for model in (("llama", "float32"), ("qwen2", "bfloat16"))
]
"""Codec, model and dtype. Qwen2's keys have biases."""

LOSSY_TOKENS = (CHUNKS - 1) * CHUNK


@cache
def expected(codec: str, family: str = "llama", dtype: str = "bfloat16") -> Outcome:
    model: Any = shared_model(family, dtype)
    return run(model, prompt(), prefilled(model, prompt(), codec))


def cache_for(model: Any, store: Store, codec: str, **options: Any) -> CakeCache:
    return CakeCache(model, store, chunk_size=CHUNK, codec=codec, exact=False, **options)


def filled(codec: str, family: str = "llama", dtype: str = "bfloat16", store: Store | None = None) -> Store:
    """A store with the prompt's chunks, coded."""
    store = MemoryStore() if store is None else store
    with cache_for(shared_model(family, dtype), store, codec) as saving:
        saving.prefill(prompt(), whole=True)
        assert saving.flush(60)
        assert saving.report.chunks_saved == CHUNKS
    return store


def loaded(
    store: Store, codec: str, family: str = "llama", dtype: str = "bfloat16", **options: Any
) -> tuple[Outcome, Any]:
    """What a run with that store gives, and its report."""
    model = shared_model(family, dtype)
    with cache_for(model, store, codec, **{"strategy": "load", **options}) as cache:
        outcome = run(model, prompt(), cache)
        assert cache.flush(60)
        return outcome, cache.report


def codec_in(value: bytes) -> str:
    return parse_encoded_header(value)[0].codec if is_encoded(value) else "none"


# Bit for bit.


@pytest.mark.parametrize(("codec", "family", "dtype"), RUNS)
def test_cold_warm_and_unsaved_are_equal(codec: str, family: str, dtype: str) -> None:
    model, store = shared_model(family, dtype), MemoryStore()
    with cache_for(model, store, codec) as cold:
        assert difference(run(model, prompt(), cold), expected(codec, family, dtype)) == ""
        assert cold.flush(60)
        assert (cold.report.chunks_computed, cold.report.chunks_saved) == (CHUNKS, CHUNKS)
        assert cold.report.tokens_lossy == LOSSY_TOKENS
    for strategy in ("load", "both", "compute"):
        outcome, report = loaded(store, codec, family, dtype, strategy=strategy)
        assert difference(outcome, expected(codec, family, dtype)) == "", strategy
        assert strategy != "load" or report.chunks_loaded == CHUNKS
        assert (report.tokens_lossy, report.chunks_failed) == (LOSSY_TOKENS, 0)
    outcome, report = loaded(MemoryStore(), codec, family, dtype, save=False)
    assert difference(outcome, expected(codec, family, dtype)) == ""
    assert report.tokens_lossy == LOSSY_TOKENS
    assert difference(expected(codec, family, dtype), oracle(model, prompt())) != ""  # the negative control


@pytest.mark.parametrize("codec", ["near", "int4", "rot4"])
def test_every_meeting_point_is_equal(codec: str) -> None:
    model, store = shared_model("llama", "bfloat16"), filled(codec)
    for meeting in range(1, CHUNKS):
        gate = ChunkGate(store)
        with cache_for(model, gate, codec, save=False, limits=ONE_LOADER) as cache:
            kv_template(model)  # runs the model, which must not count
            with chunks_meet_at(model, gate, meeting):
                outcome = run(model, prompt(), cache)
            assert (cache.report.chunks_computed, cache.report.chunks_loaded) == (meeting, CHUNKS - meeting)
        assert difference(outcome, expected(codec)) == "", f"met at {meeting}"


@pytest.mark.parametrize("hole", range(CHUNKS))
def test_every_hole_is_computed_to_the_same(hole: int) -> None:
    codec = "int4"
    store = filled(codec)
    before = chunks_of(store)
    store.delete(parse_encoded_header(before[hole])[0].facts.key)
    outcome, report = loaded(store, codec)
    assert difference(outcome, expected(codec)) == ""
    assert (report.chunks_loaded, report.chunks_missed, report.chunks_saved) == (CHUNKS - 1, 1, 1)
    assert chunks_of(store) == before


@pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these
@pytest.mark.parametrize("family", here("gemma3", "mistral", "qwen3_next", "lfm2", "deepseek_v3", "gpt_oss"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_windows_states_and_latents(family: str, dtype: torch.dtype) -> None:
    model: Any = family_model(family, dtype)
    plain = generate(model, prefilled(model, FAMILY_IDS, "int4"))
    store = MemoryStore()
    with cache_for(model, store, "int4") as cold:
        assert family_difference(generate(model, cold), plain) == ""
        assert cold.flush(60)
        coded = cold.report.tokens_lossy
        assert coded in (0, 5 * CHUNK)
    assert coded or family in ("mistral",)
    for strategy in ("load", "both"):
        with cache_for(model, store, "int4", strategy=strategy, save=False) as warm:
            assert family_difference(generate(model, warm), plain) == ""
            assert (warm.report.chunks_failed, warm.report.tokens_lossy) == (0, coded)
            assert strategy == "both" or warm.report.chunks_loaded == len(chunks_of(store))


@pytest.mark.parametrize("tokens", [CHUNK * 3, CHUNK * 3 + 1, CHUNK * 4 - 1, CHUNK * 4])
def test_a_suffix_of_a_full_chunk_is_coded_once_it_has_run(tokens: int) -> None:
    """So that what follows sees the same as in a longer prompt, whatever is stored."""
    model, store = shared_model("llama", "bfloat16"), MemoryStore()
    ids = prompt(tokens)
    first, again, longer = None, None, prompt(tokens + 2 * CHUNK)
    longer[:, :tokens] = ids
    with cache_for(model, store, "int4") as cold:
        first = run(model, ids, cold)
        assert cold.report.tokens_lossy == (tokens // CHUNK - 1) * CHUNK
        assert cold.flush(60)
    with cache_for(model, MemoryStore(), "int4", save=False) as unsaved:
        assert difference(run(model, ids, unsaved), first) == ""
    with cache_for(model, store, "int4", strategy="load") as warm:
        again = run(model, ids, warm)
    assert difference(again, first) == ""
    kept = chunks_of(store)
    assert len(kept) == tokens // CHUNK
    with cache_for(model, MemoryStore(), "int4") as whole:
        other = run(model, longer, whole)
        assert whole.flush(60)
        assert {n: value for n, value in chunks_of(whole.store).items() if n in kept} == kept
    with cache_for(model, store, "int4", strategy="load") as warm:
        assert difference(run(model, longer, warm), other) == ""
        assert warm.report.chunks_loaded == tokens // CHUNK
    for one, two in zip(first.keys, other.keys, strict=True):
        end = tokens // CHUNK * CHUNK
        assert torch.equal(one[:, :, :end], two[:, :, :end])


def test_tails_before_cuts_stay_exact() -> None:
    model, store = shared_model("llama", "bfloat16"), MemoryStore()
    cuts = (CHUNK * 2 + 5, CHUNK * 5)
    wanted = run(model, prompt(), prefilled(model, prompt(), "int4", cuts))
    lossy = CHUNK + 2 * CHUNK + 3 * CHUNK
    for strategy in ("compute", "load", "both"):
        with cache_for(model, store, "int4", strategy=strategy) as cache:
            cache.prefill(prompt(), boundaries=cuts, whole=True)
            assert difference(run(model, prompt(), cache), wanted) == "", strategy
            assert cache.report.tokens_lossy == lossy
            assert cache.flush(60)
    tails = [value for value in chunks_of(store).values() if int(parse_encoded_header(value)[1].chunk_size) < CHUNK]
    assert tails
    assert set(map(codec_in, tails)) == {"lossless"}


def test_a_document_and_questions_about_it() -> None:
    model, store = shared_model("llama", "bfloat16"), MemoryStore()
    document, found = prompt(CHUNK * 4), []
    for strategy in ("both", "load"):
        with cache_for(model, store, "int4", strategy=strategy) as cache:
            cache.prefill(document)
            found.append(run(model, prompt(), copy.deepcopy(cache)))
            assert cache.flush(60)
    assert difference(*found) == ""
    assert difference(found[0], run(model, prompt(), prefilled(model, prompt(), "int4", (CHUNK * 4,)))) == ""


def test_turns_of_a_conversation_stay_exact_and_are_the_same_elsewhere() -> None:
    model, store = shared_model("llama", "bfloat16"), MemoryStore()
    outcomes = []
    first = prompt(CHUNK * 3 + 5)
    with cache_for(model, store, "int4") as cache:
        reply = run(model, first, cache).tokens
        boundaries = cache.end_turn()
        second = torch.cat([reply, prompt(2 * CHUNK, seed=5)], dim=1)
        outcomes.append(run(model, second, cache, attention_mask=torch.ones_like(second)))
        assert cache.flush(60)
    for strategy in ("load", "compute"):
        with cache_for(model, store, "int4", strategy=strategy) as other:
            other.prefill(second[:, : boundaries[-1]], boundaries=boundaries)
            outcomes.append(run(model, second, other, attention_mask=torch.ones_like(second)))
    assert difference(outcomes[0], outcomes[1]) == ""
    assert difference(outcomes[0], outcomes[2]) == ""


@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_a_batch_are_restored_as_alone(rows: int) -> None:
    model, store = shared_model("llama", "bfloat16"), MemoryStore()
    ids = torch.cat([prompt(), prompt(seed=2)])
    ids = torch.cat([ids, ids[:rows]])
    runs = []
    for strategy in ("compute", "load", "both"):
        with cache_for(model, store, "int4", strategy=strategy) as cache:
            runs.append(run(model, ids, cache))
            assert cache.report.tokens_lossy == len(ids) * LOSSY_TOKENS
            assert cache.flush(60)
    assert difference(runs[0], runs[1]) == difference(runs[0], runs[2]) == ""
    end = CHUNKS * CHUNK
    for keys, alone in zip(runs[0].keys, expected("int4").keys, strict=True):
        assert torch.equal(keys[:1, :, :end], alone[:, :, :end])


def test_beams_start_from_one_row() -> None:
    model, store = shared_model("llama", "bfloat16"), MemoryStore()
    found = []
    for strategy in ("compute", "load"):
        with cache_for(model, store, "int4", strategy=strategy) as cache:
            found.append(run(model, prompt(), cache, num_beams=2))
            assert cache.flush(60)
    assert difference(*found) == ""


# What is stored.


@pytest.mark.parametrize(("codec", "family", "dtype"), RUNS)
def test_the_first_chunk_is_exact_and_the_others_coded(codec: str, family: str, dtype: str) -> None:
    kept = chunks_of(filled(codec, family, dtype))
    exact = "lossless" if dtype == "bfloat16" else "none"
    assert [codec_in(kept[index]) for index in range(CHUNKS)] == [exact, *[codec] * (CHUNKS - 1)]
    reference: Any = oracle(shared_model(family, dtype), prompt())
    for ours, theirs in zip(expected(codec, family, dtype).keys, reference.keys, strict=True):
        assert torch.equal(ours[:, :, :CHUNK], theirs[:, :, :CHUNK])


def test_float32_is_said_to_be_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    filled("int4", dtype="float32")
    assert not caplog.records


@pytest.mark.parametrize("kind", ["disk", "tiers"])
def test_stores_on_disk_and_in_tiers(kind: str, tmp_path: Path) -> None:
    inner = LocalStore(tmp_path)
    store = filled("int4", store=inner if kind == "disk" else TierStore([MemoryStore(), inner]))
    outcome, report = loaded(store, "int4")
    assert difference(outcome, expected("int4")) == ""
    assert report.chunks_loaded == CHUNKS
    assert report.bytes_stored == sum(map(len, chunks_of(store).values()))


def test_codecs_do_not_find_each_others_chunks() -> None:
    """Nor do exact caches, nor inexact ones without a codec; all share one store."""
    store = MemoryStore()
    with CakeCache(shared_model("llama", "bfloat16"), store, chunk_size=CHUNK) as exact:
        exact.prefill(prompt(), whole=True)
        assert exact.flush(60)
    with CakeCache(shared_model("llama", "bfloat16"), store, chunk_size=CHUNK, exact=False) as inexact:
        inexact.prefill(prompt(), whole=True)
        assert inexact.report.chunks_loaded == 0
        assert inexact.flush(60)
    codecs = [codec for codec in LOSSY if codec != "cachegen"]
    for codec in codecs:
        outcome, report = loaded(store, codec)
        assert difference(outcome, expected(codec)) == ""
        assert (report.chunks_loaded, report.chunks_saved) == (0, CHUNKS)
    for codec in codecs:
        outcome, report = loaded(store, codec)
        assert difference(outcome, expected(codec)) == ""
        assert report.chunks_loaded == CHUNKS
    for exact_too in (True, False):
        with CakeCache(
            shared_model("llama", "bfloat16"),
            store,
            chunk_size=CHUNK,
            exact=exact_too,
            strategy="load",
            codec="lossless",
        ) as again:
            assert difference(run(again._session.model, prompt(), again), oracle(again._session.model, prompt())) == ""
            assert (again.report.chunks_loaded, again.report.tokens_lossy) == (CHUNKS, 0)


# What is wrong with a chunk, or with the store.


def flipped(at: float) -> Any:
    def change(value: bytearray) -> bytearray:
        value[min(len(value) - 1, int(len(value) * at))] ^= 1
        return value

    return change


@pytest.mark.fault(
    "KV", "Chunks of a lossy codec are damaged, cut or swapped.", "They are computed to the very same KV, and replaced."
)
@pytest.mark.parametrize(
    "change",
    [flipped(0.7), flipped(0.95), flipped(1.0), flipped(0.05), lambda value: value[:-1], lambda value: value + b"\0",
     lambda value: value[:5000], lambda value: value[:3], lambda value: bytearray(len(value))],
    ids=["base", "later base", "end", "header", "short", "long", "cut", "stub", "zeros"],
)  # fmt: skip
def test_a_damaged_chunk_is_computed_to_the_same(change: Any) -> None:
    codec = "quantspec"
    store = filled(codec)
    before = chunks_of(store)
    key = parse_encoded_header(before[5])[0].facts.key
    store.write(key, [change(bytearray(before[5]))], replace=True)
    outcome, report = loaded(store, codec)
    assert difference(outcome, expected(codec)) == ""
    assert (report.chunks_loaded, report.chunks_failed, report.chunks_saved) == (CHUNKS - 1, 1, 1)
    assert report.tokens_lossy == LOSSY_TOKENS
    assert chunks_of(store) == before


@pytest.mark.fault(
    "KV", "A chunk is of a later version of a lossy codec.", "A miss, with the codec's name; it is not replaced."
)
def test_a_chunk_of_a_later_version_of_the_codec_is_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    from test_encoded_header import header_of, replaced, resealed

    store = filled("int4")
    value = chunks_of(store)[5]
    metadata, _ = parse_encoded_header(value)
    header = resealed(replaced("codec_version", "9")(header_of(value)))
    newer = header + value[len(header) :]
    store.write(metadata.facts.key, [newer], replace=True)
    outcome, report = loaded(store, "int4")
    assert difference(outcome, expected("int4")) == ""
    assert report.chunks_missed == 1
    assert "version 9 of 'int4'" in caplog.text
    assert values_of(store, metadata.facts.key) == newer


def values_of(store: Store, key: str) -> bytes:
    return bytes(store.read(key) or b"")


@pytest.mark.fault("Stores", "Reads fail, and the codec is lossy.", "The chunks are computed to the very same KV.")
@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_failing_reads_change_nothing(rate: float) -> None:
    outcome, report = loaded(FaultStore(filled("int4"), rate=rate, seed=3), "int4", save=False)
    assert difference(outcome, expected("int4")) == ""
    assert report.tokens_lossy == LOSSY_TOKENS


@pytest.mark.fault(
    "Stores",
    "The store cannot say which model its KV is from, and the codec is lossy.",
    "The lossy schedule is computed, under keys of its own.",
)
@pytest.mark.parametrize("kind", ["error", "hangs in size", "corrupt and read-only"])
def test_a_store_that_does_not_answer_at_first_changes_nothing(kind: str) -> None:
    class Silent(WrapperStore):
        def size(self, key: str) -> int | None:
            if kind == "hangs in size":
                raise TimeoutError("an injected fault")
            return 1 if kind == "corrupt and read-only" else super().size(key)

        def read_into(self, key: str, parts: Sequence[memoryview]) -> int | None:
            raise StoreError("an injected fault")

    outcome, report = loaded(Silent(filled("int4")), "int4", save=kind == "error")
    assert difference(outcome, expected("int4")) == ""
    assert (report.tokens_lossy, report.chunks_loaded) == (LOSSY_TOKENS, 0)
    two = torch.cat([prompt(), prompt(seed=2)])
    model = shared_model("llama", "bfloat16")
    rows = []
    for store in (Silent(filled("int4")), MemoryStore()):
        with cache_for(model, store, "int4", save=False) as cache:
            rows.append(run(model, two, cache))
    assert difference(*rows) == ""


def test_a_store_that_answers_every_other_time_changes_nothing() -> None:
    """A namespace is made more than once for a prompt; a store's moods must not look like those of a model."""

    class Moody(WrapperStore):
        asked = 0

        def size(self, key: str) -> int | None:
            self.asked += 1
            if self.asked % 2:
                raise StoreError("an injected fault")
            return super().size(key)

    for _ in range(2):
        outcome, report = loaded(Moody(filled("int4")), "int4", save=False)
        assert difference(outcome, expected("int4")) == ""
        assert report.tokens_lossy == LOSSY_TOKENS


# What users are told.


def test_the_report_says_it() -> None:
    _, report = loaded(filled("int4"), "int4")
    assert f"lossy       {LOSSY_TOKENS} tokens, whose KV is not exact" in str(report)
    assert report.as_dict()["tokens_lossy"] == LOSSY_TOKENS
    assert "whose KV is not exact" not in str(loaded(filled("int4"), "none")[1])
    assert report.tokens == TAIL + CHUNK + LOSSY_TOKENS


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("options", [{}, {"exact": True}])
def test_a_lossy_codec_needs_leave(codec: str, options: dict[str, Any]) -> None:
    for call in (
        lambda: CakeCache(shared_model("llama"), MemoryStore(), codec=codec, **options),
        lambda: cake_hf.generate(shared_model("llama"), prompt(), store=MemoryStore(), codec=codec, **options),
    ):
        with pytest.raises(ValueError, match=f"codec '{codec}' is lossy: pass exact=False .* or take codec='lossless'"):
            call()


@pytest.mark.parametrize("codec", ["int3", "INT4", "kivi", "fp8"])
def test_an_unknown_codec_lists_the_lossy_ones_too(codec: str) -> None:
    with pytest.raises(ValueError, match=r"choose one of none, lossless, auto, near, .*int8, .*int4, .*kivi2"):
        CakeCache(shared_model("llama"), MemoryStore(), codec=codec, exact=False)


def test_a_codec_whose_library_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from cake_hf.chunks import lossy

    monkeypatch.setattr(lossy, "find_spec", lambda name: None)
    with pytest.raises(CakeError, match=r'cachegen needs constriction: pip install "cake-hf\[cachegen\]"'):
        CakeCache(shared_model("llama"), MemoryStore(), codec="cachegen", exact=False)


def test_generate_takes_it() -> None:
    model, store = shared_model("llama", "bfloat16"), MemoryStore()
    options: Any = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = cake_hf.generate(model, prompt(), store=store, chunk_size=CHUNK, codec="int4", exact=False, **options)
    assert torch.equal(found, expected("int4").tokens)
    assert {codec_in(value) for value in chunks_of(store).values()} == {"lossless", "int4"}
