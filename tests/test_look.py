"""A prompt looks at its model once, and again after each forward; and what that takes is counted by a script."""

from __future__ import annotations

import re
import sys
import threading
from collections import Counter
from typing import Any

import pytest
import torch

from cake_hf import CakeCache, MemoryStore
from cake_hf.model import kv_layout
from cake_hf.model import look as tree
from cake_hf.model.kv_layout import run_aside
from cake_hf.model.look import look_again, once_per_look, one_look
from models import CHUNK, build, prompt, run
from old_versions import OLD
from scripted import load_script

SCRIPT = load_script("trace_restore")


@pytest.fixture(scope="module")
def trace() -> Any:
    return SCRIPT.warm_restore()


class Asked:
    """A function of a model that counts how often it is found out."""

    def __init__(self) -> None:
        self.count = 0
        self.answer = once_per_look(self.find)

    def find(self, model: object) -> int:
        self.count += 1
        return self.count


def test_within_a_look_an_answer_is_kept() -> None:
    asked = Asked()
    with one_look():
        assert [asked.answer("a"), asked.answer("a"), asked.answer("b"), asked.answer("a")] == [1, 1, 2, 1]


def test_outside_of_a_look_no_answer_is_kept() -> None:
    asked = Asked()
    with one_look():
        asked.answer("a")
    assert [asked.answer("a"), asked.answer("a")] == [2, 3]


def test_a_look_within_another_one_ends_with_that() -> None:
    asked = Asked()
    with one_look():
        with one_look():
            asked.answer("a")
        assert asked.answer("a") == 1
    assert asked.answer("a") == 2


def test_a_new_look_asks_again() -> None:
    asked = Asked()
    look_again()  # no look: nothing to be forgotten
    with one_look():
        asked.answer("a")
        look_again()
        assert asked.answer("a") == 2


def test_an_error_is_no_answer_and_ends_the_look() -> None:
    def fails(model: object) -> object:
        raise ValueError(model)

    asked, failing = Asked(), once_per_look(fails)

    def look() -> None:
        with one_look():
            asked.answer("a")
            failing("a")

    with pytest.raises(ValueError, match="a"):
        look()
    assert asked.answer("a") == 2


def test_another_thread_has_a_look_of_its_own() -> None:
    asked, seen = Asked(), []
    with one_look():
        asked.answer("a")
        thread = threading.Thread(target=lambda: seen.append(asked.answer("a")))
        thread.start()
        thread.join()
    assert seen == [2]


@pytest.mark.parametrize(
    ("function", "most"),
    [
        (kv_layout.made_by, 2),
        (tree.home_device, 2),
        (tree.modules_of, 3),  # the third one asks whether the model is compiled by now
        (tree.modules_everywhere, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_warm_prompt_looks_at_its_model_before_and_after_a_forward(trace: Any, function: Any, most: int) -> None:
    assert 1 <= trace.functions[function.__wrapped__.__code__] <= most


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("stored", [True, False])
def test_the_first_prompt_of_a_model_probes_it_once(
    stored: bool, rows: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of its KV and its behaviour are read from the same short forward."""
    ids, store, count = prompt(3 * CHUNK + 5).repeat(rows, 1), MemoryStore(), 0
    if stored:
        earlier = build(family)
        with CakeCache(earlier, store, chunk_size=CHUNK) as cache:
            run(earlier, ids, cache)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return run_aside(*args, **kwargs)

    model = build(family)  # nothing is known of it, as in a new process
    monkeypatch.setattr(kv_layout, "run_aside", counted)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        run(model, ids, cache)
        first = count
        assert first == 1 + OLD  # with older versions a trial comes between the two
        assert cache.report.chunks_loaded == (3 if stored else 0)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        run(model, ids, cache)
        assert count == first + 1  # it may have been changed since


def test_what_is_changed_between_two_prompts_is_seen() -> None:
    """A look ends with its prompt: another dtype has another layout, and other chunks."""
    model, ids, store = build("llama"), prompt(3 * CHUNK + 5), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        run(model, ids, cache)
    model.to(torch.bfloat16)
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        run(model, ids, cache)
        assert cache.report.chunks_computed == 3
        cache.flush()
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        run(model, ids, cache)
        assert cache.report.chunks_loaded == 3


@pytest.mark.fault(
    "Model",
    "The model gets another dtype between two prompts, or is run under autocast.",
    "The chunks of its former layout are not read; they count as missed, not as broken.",
)
@pytest.mark.parametrize("change", ["bfloat16", "float16", "autocast"])
def test_chunks_of_another_layout_are_not_read_as_if_they_were_broken(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids, store = build("llama"), prompt(3 * CHUNK + 5), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        run(model, ids, cache)
    is_autocast = change == "autocast"
    if not is_autocast:
        model.to(getattr(torch, change))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast),
        CakeCache(model, store, chunk_size=CHUNK) as cache,
    ):
        run(model, ids, cache)
        assert (cache.report.chunks_loaded, cache.report.chunks_failed) == (0, 0)
    assert "not usable" not in caplog.text


def test_the_script_counts_files_functions_and_crossings(trace: Any) -> None:
    assert 0 < len(trace.files) <= len(trace.functions) <= sum(trace.functions.values())
    assert trace.total == sum(n for (caller, _), n in trace.crossings.items() if caller != SCRIPT.OUTSIDE)
    assert trace.crossings == Counter(
        {pair: sum(n for (*two, _), n in trace.borders.items() if tuple(two) == pair) for pair in trace.crossings}
    )
    assert all(caller != called for caller, called in trace.crossings)
    assert "restore/restore.py" in trace.files


@pytest.mark.parametrize(("options", "lists"), [([], False), (["--calls"], True), (["--tokens", "2"], False)])
def test_the_script_prints_them(
    options: list[str], lists: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trace_restore.py", *options])
    SCRIPT.main()
    first, *others = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ files, \d+ functions, \d+ border crossings", first)
    assert any("restore/hook.py -> cache/restoring.py" in line for line in others) is lists
