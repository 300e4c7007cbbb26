"""Law 1: whatever was computed, loaded or missing, tokens, logits and KV are those of a chunked run, bit for bit."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

import cake_hf
import models
from cake_hf import CakeCache, Limits, LocalStore, MemoryStore
from cake_hf.chunks.codec import checksums, encode_header, parse_header
from cake_hf.model.kv_layout import kv_template
from cake_hf.testing import GateStore
from forwards import meeting_at
from models import CHUNK, CHUNKS, DTYPES, FAMILIES, Outcome, difference, prompt, shared_model
from stored import filled_store, keys_in_order, without

ATTENTIONS = ("eager", "sdpa")
VARIANTS = list(itertools.product(FAMILIES, DTYPES, ATTENTIONS))

every_variant = pytest.mark.parametrize(("family", "dtype", "attention"), VARIANTS)


NEW_TOKENS = 16
run = partial(models.run, max_new_tokens=NEW_TOKENS)
oracle = partial(models.oracle, max_new_tokens=NEW_TOKENS)


@cache
def expected(family: str, dtype: str, attention: str) -> Outcome:
    return oracle(shared_model(family, dtype, attention), prompt())


@every_variant
def test_cold_and_saving_changes_nothing(family: str, dtype: str, attention: str) -> None:
    with CakeCache(shared_model(family, dtype, attention), MemoryStore(), chunk_size=CHUNK) as cold:
        outcome = run(shared_model(family, dtype, attention), prompt(), cold)
        assert cold.flush(60)
        assert (cold.report.chunks_computed, cold.report.chunks_missed, cold.report.chunks_saved) == (CHUNKS,) * 3
    assert difference(outcome, expected(family, dtype, attention)) == ""


@every_variant
def test_every_meeting_point(family: str, dtype: str, attention: str) -> None:
    model = shared_model(family, dtype, attention)
    for meeting in range(1, CHUNKS):
        gate = GateStore(filled_store(model))
        # One loader: a second one would hold the chunk before the meeting point.
        with CakeCache(
            model, gate, chunk_size=CHUNK, save=False, limits=Limits.from_environment(loader_threads=1)
        ) as warm:
            kv_template(model)  # runs the model once, which must not count
            with meeting_at(model, gate, meeting, CHUNKS - meeting):
                outcome = run(model, prompt(), warm)
            assert (warm.report.chunks_computed, warm.report.chunks_loaded) == (meeting, CHUNKS - meeting)
        assert difference(outcome, expected(family, dtype, attention)) == "", f"met at {meeting}"


@every_variant
@pytest.mark.parametrize(("strategy", "computed"), [("load", 0), ("compute", CHUNKS)])
def test_loading_all_and_computing_all_are_exact(
    family: str, dtype: str, attention: str, strategy: str, computed: int
) -> None:
    """Meeting points 0 and 8: everything loaded, everything computed."""
    model = shared_model(family, dtype, attention)
    store = filled_store(model)
    with CakeCache(model, store, chunk_size=CHUNK, strategy=strategy) as warm:
        outcome = run(model, prompt(), warm)
        assert (warm.report.chunks_computed, warm.report.chunks_loaded) == (computed, CHUNKS - computed)
        assert warm.report.chunks_saved == 0
    assert difference(outcome, expected(family, dtype, attention)) == ""


@every_variant
@pytest.mark.parametrize("holes", [(0,), (7,), (3, 4), (0, 1, 2, 5), (1, 3, 5, 7)], ids=str)
def test_holes_are_computed_and_filled(family: str, dtype: str, attention: str, holes: tuple[int, ...]) -> None:
    model = shared_model(family, dtype, attention)
    full = filled_store(model)
    store = without(full, *holes)
    assert len(list(store.keys())) == CHUNKS - len(holes)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as warm:
        outcome = run(model, prompt(), warm)
        assert warm.flush(60)
        assert (warm.report.chunks_missed, warm.report.chunks_saved) == (len(holes), len(holes))
        assert warm.report.chunks_loaded == CHUNKS - len(holes)
    assert difference(outcome, expected(family, dtype, attention)) == ""
    assert all(store.read(key) == full.read(key) for key in full.keys())  # noqa: SIM118


@pytest.mark.timeout(600)
def test_fresh_process(tmp_path: Path) -> None:
    """Chunks saved by another process serve this one, for every variant."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "import test_parity\n"
        "test_parity.save_all(Path(sys.argv[2]))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)], check=True, timeout=280)
    for variant in VARIANTS:
        model = shared_model(*variant)
        with CakeCache(model, tmp_path, chunk_size=CHUNK, strategy="load") as warm:
            outcome = run(model, prompt(), warm)
            assert (warm.report.chunks_loaded, warm.report.chunks_computed) == (CHUNKS, 0), variant
        assert difference(outcome, expected(*variant)) == "", variant


def save_all(directory: Path) -> None:
    """What the other process of `test_fresh_process` does."""
    for variant in VARIANTS:
        cake_hf.generate(shared_model(*variant), prompt(), store=directory, chunk_size=CHUNK, max_new_tokens=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_single_shot_gives_the_same_tokens_in_float32(family: str, attention: str) -> None:
    model = shared_model(family, "float32", attention)
    single = model.generate(prompt(), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(single, expected(family, "float32", attention).tokens)


@pytest.mark.parametrize("tokens", [CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 4 * CHUNK, 4 * CHUNK + 1])
def test_prompt_lengths_at_the_edges(tokens: int) -> None:
    """Also where the prompt ends with a full chunk: it is run, since its logits are needed, and saved like the others."""
    model, store = shared_model("llama"), MemoryStore()
    for turn in range(3):
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            outcome = run(model, prompt(tokens), cache)
            assert cache.flush(60)
            assert cache.report.chunks_saved == (tokens // CHUNK if turn == 0 else 0)
            report = cache.report
            assert report.chunks_computed + report.chunks_loaded + report.chunks_shared == (tokens - 1) // CHUNK
        assert difference(outcome, oracle(model, prompt(tokens))) == ""
    assert len(list(store.keys())) == tokens // CHUNK


def test_a_longer_prompt_uses_the_shorter_ones_chunks() -> None:
    model, store = shared_model("llama"), MemoryStore()
    long = prompt(6 * CHUNK + 3)
    with CakeCache(model, store, chunk_size=CHUNK) as first:
        run(model, long[:, : 3 * CHUNK + 5], first)
    with CakeCache(model, store, chunk_size=CHUNK) as second:
        outcome = run(model, long, second)
        assert second.report.chunks_missed == 3
    assert difference(outcome, oracle(model, long)) == ""


def test_a_wrong_payload_shows(tmp_path: Path) -> None:
    """Negative control: one flipped payload bit, hidden from the checksum, and the comparison must fail."""
    model, store = shared_model("llama"), LocalStore(tmp_path)
    with CakeCache(model, store, chunk_size=CHUNK) as saving:
        saving.prefill(prompt())
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as honest:
        assert difference(run(model, prompt(), honest), expected("llama", "float32", "sdpa")) == ""
    forge(store, keys_in_order(store)[2], honest._session.bound_model.layout())
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as deceived:
        outcome = run(model, prompt(), deceived)
        assert deceived.report.chunks_loaded == CHUNKS
    assert difference(outcome, expected("llama", "float32", "sdpa")) != ""


def forge(store: LocalStore, key: str, layout: cake_hf.chunks.layout.ChunkLayout) -> None:
    """Flip a high bit of a stored value and make the chunk look sound again."""
    value = store.read(key)
    assert value is not None
    payload = value[-layout.nbytes :]
    payload[3] ^= 0x40
    facts = replace(parse_header(value)[0], checksums=checksums(payload, layout))
    store.write(key, [encode_header(layout, facts), payload], replace=True)
