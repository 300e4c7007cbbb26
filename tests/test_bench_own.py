"""`python -m benchmarks --model`: figures of a user's model, without verdicts, and JSON where it is asked for."""

from __future__ import annotations

import json

import pytest

from benchmarks.own_model import own_settings
from benchmarks.settings import Settings
from commands import flat, run_benchmark

QUICK = ("--model", "recall-tiny", "--device", "cpu", "--quick", "--repeats", 1, "--tokens", 128)


def test_a_table_without_verdicts() -> None:
    result = run_benchmark(*QUICK, "--only", "prompt")
    assert result.exit_code == 0, result.output
    told = flat(result.stdout)
    assert "A prompt of 160 tokens in chunks of 64" in told
    assert "warm, from the disk" in told
    assert not {"goal", "met", "yes", "no"} & set(told.split())
    assert "{" not in told


def test_json_where_it_is_asked_for() -> None:
    result = run_benchmark(*QUICK, "--only", "decoding", "--json")
    outcome = json.loads(result.stdout)
    assert outcome["results"].keys() == {"decoding"}
    assert outcome["settings"]["model"] == "recall-tiny"
    assert outcome["settings"]["dtype"] == "auto"
    figures = [figure for name, figure in outcome["results"]["decoding"].items() if name != "details"]
    assert all(figure["goal"] is None and figure["met"] is None for figure in figures)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--shape", "tiny"), "leave out --shape"),
        (("--only", "memory"), "choose from prompt, decoding"),
        (("--tokens", 10**6), "choose fewer --tokens"),
        (("--tokens", 20), "less than two chunks"),
        (("--device", "gpu9"), "cannot be used here"),
    ],
)
def test_unusable_options_are_refused_in_one_sentence(more: tuple[object, ...], complaint: str) -> None:
    result = run_benchmark(*QUICK, *more)
    assert result.exit_code == 2, result.output
    assert complaint in flat(result.stderr)


def test_a_model_that_is_not_there() -> None:
    result = run_benchmark("--model", "./nowhere", "--quick")
    assert result.exit_code == 2
    assert "There is no folder" in flat(result.stderr)


def test_the_usual_length_fits_the_model() -> None:
    settings = own_settings(
        "recall-tiny", quick=False, repeats=None, tokens=None, chunk_size=None, dtype="auto", device="cpu"
    )
    assert (settings.tokens, settings.chunk_size, settings.shape.layers) == (2048, 512, 4)


def test_a_folder_stays_private() -> None:
    assert Settings(model="/home/somebody/models/mine").as_dict()["model"] == "mine"
    assert Settings(model="org/model").as_dict()["model"] == "org/model"
