"""`python -m benchmarks codec`: that it runs, keeps KV, and that its figures are of the bytes that there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.codec import real_kv, restore, speed
from benchmarks.codec.real_kv import RealKv
from cake_hf import CakeError
from cake_hf.chunks.lossless import Encoded
from commands import run_benchmark, save_model, write_text


def of_random_numbers(tokens: int = 64) -> RealKv:
    return RealKv("random", [torch.randn(tokens, 2, 16).to(torch.bfloat16) for _ in range(4)])


def test_all_is_measured(tmp_path: Path) -> None:
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "words.txt", 100)
    arguments = ["--model", model, "--text", text, "--tokens", 64, "--chunk-size", 32, "--rounds", 1]
    run = run_benchmark("codec", *arguments, "--kv", tmp_path / "kv", "--out", tmp_path / "out.json", "--json")
    assert run.exit_code == 0, run.output
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert outcome == json.loads(run.stdout.splitlines()[-1])
    assert {"words_32", "lossy_32", "header_32", "together_32", "beside"} == outcome["results"].keys()
    found = outcome["results"]["words_32"]
    assert found["size"]["value"] < 0.9
    assert found["base_size"]["value"] < found["size"]["value"] < found["file_size"]["value"]
    assert found["details"] == {"chunks": 2, "chunk_size": 32, "raw_bytes": found["details"]["raw_bytes"]}
    lossy = outcome["results"]["lossy_32"]
    assert {"int8_code", "int8_decode", "int8_by_pieces_decode", "near_decode", "int8_size"} <= lossy.keys()
    assert 0.3 < lossy["int8_size"]["value"] < 0.8
    assert "cpu" in outcome["machine"]
    [kept] = real_kv.kept(tmp_path / "kv")
    assert kept.name == "words"
    assert kept.tokens == 64


def test_restores_with_encoded_chunks_are_compared(tmp_path: Path) -> None:
    """By a shape, with random weights."""
    restore.main("tiny", tokens=128, chunk_size=16, rounds=1, out=tmp_path / "out.json")
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert (outcome["model"], outcome["tokens"]) == ("tiny", 128)
    assert outcome["size"] < 0.9
    places = {"memory, load", "page cache, load", "page cache, load, auto"}
    lines = {f"{strategy} at {share:g}" for strategy in ("both", "load") for share in restore.SHARES}
    assert outcome["cells"].keys() == places | lines
    assert all(cell["low"] <= cell["ratio"] <= cell["high"] for cell in outcome["cells"].values())


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "words.txt", 20)
    run = run_benchmark("codec", "--model", model, "--text", text, "--tokens", 64, "--rounds", 1)
    assert run.exit_code == 2
    assert "choose fewer --tokens" in run.output
    run = run_benchmark("codec", "--model", model, "--text", text, "--tokens", 20, "--chunk-size", 32, "--rounds", 1)
    assert run.exit_code == 2
    assert "a smaller --chunk-size" in run.output


def test_wrong_bits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_nothing(*arguments: object, **options: object) -> None:
        """As a codec would that forgets its work."""

    monkeypatch.setattr(speed, "decode_into", decode_nothing)
    with pytest.raises(CakeError, match="other bits"):
        speed.measure(of_random_numbers(), 32, 1)


def test_chunks_are_cut_as_they_are_stored() -> None:
    kv = of_random_numbers(70)
    layout, payloads = kv.layout(32), kv.payloads(32)
    assert [len(payload) for payload in payloads] == [layout.nbytes] * 2
    second = kv.pieces[1][32:64].contiguous().view(torch.uint8).numpy().tobytes()
    assert payloads[1][layout.sizes[0] : sum(layout.sizes[:2])] == second


def test_the_whole_file_is_counted() -> None:
    kv = of_random_numbers()
    result = speed.measure(kv, 64, 1)
    encoded: Encoded = speed.encode(kv.payloads(64)[0], kv.layout(64))
    assert result.figures["size"].value == encoded.sizes.nbytes / kv.layout(64).nbytes
