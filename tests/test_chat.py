"""A chat template's prompts: what is warmed is hit, turn by turn and across a restart, and tokens are those without a cache."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

import cake_hf
from cake_hf import CakeCache, CakeError, MemoryStore, chat_document, chat_prompt
from cake_hf.assets import RECALL_TINY
from cake_hf.cli.app import app
from cake_hf.cli.models import load_model, load_tokenizer
from naming import given
from test_cuts import forwards

CHUNK = 48
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are helpful."
    "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as many models have it."""

DOCUMENT = "The harbour opened in 1901. " * 12
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = load_tokenizer(str(RECALL_TINY))
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(str(RECALL_TINY), "float32", "cpu")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def without_cache(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)


def test_hits_grow_from_turn_to_turn_and_across_a_restart(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Each turn in a cache of its own, as after a restart: the whole conversation is rendered, and cut where messages end."""
    messages = [{"role": "system", "content": "Answer from the text."}, user(f"{DOCUMENT}\n\nWhen did it open?")]
    hits = []
    for question in ("And the station?", "Why is that so?", "Thank you."):
        prompt = chat_prompt(tokenizer, messages)
        with CakeCache(model, tmp_path, chunk_size=CHUNK, strategy="load") as cache:
            report = cache.prefill(prompt.input_ids[:, : prompt.boundaries[-1]], boundaries=prompt.boundaries)
            out = model.generate(prompt.input_ids, **given(cache), **OPTIONS)
        assert torch.equal(out, without_cache(model, prompt.input_ids))
        hits.append(report.chunks_loaded + report.tails_loaded)
        reply = tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
        messages += [{"role": "assistant", "content": reply}, user(question)]
    assert hits[0] == 0
    assert hits[0] < hits[1] < hits[2]


def test_the_same_by_generate(model: Any, tokenizer: Any) -> None:
    store, messages = MemoryStore(), [user(DOCUMENT)]
    for _ in range(3):
        ids, boundaries = chat_prompt(tokenizer, messages)
        out = cake_hf.generate(model, ids, store=store, boundaries=boundaries, chunk_size=CHUNK, **OPTIONS)
        assert torch.equal(out, without_cache(model, ids))
        messages += [{"role": "assistant", "content": "It is so."}, user("Why?")]


def test_one_cache_for_a_conversation(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Turns in one cache compute what is new, and a new one takes up all of it."""
    said = chat_prompt(tokenizer, [user(f"{DOCUMENT}\n\nWhen?")]).input_ids
    between = tokenizer(
        "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )
    plain = DynamicCache(config=model.config)
    with CakeCache(model, tmp_path, chunk_size=CHUNK, strategy="load") as cache:
        for turn in range(3):
            with forwards(model) as seen:
                out = model.generate(said, **given(cache), **OPTIONS)
            assert turn == 0 or sum(seen) == len(between.input_ids) + 1 + OPTIONS["max_new_tokens"] - 1
            assert torch.equal(out, model.generate(said, **given(plain), **OPTIONS))
            said = torch.cat([out, torch.tensor([between.input_ids])], dim=1)
        boundaries = cache.end_turn()
    with CakeCache(model, tmp_path, chunk_size=CHUNK, strategy="load") as cache:
        report = cache.prefill(out[:, : boundaries[-1]], boundaries=boundaries)
        assert (report.chunks_computed, report.tails_computed) == (0, 0)
        assert boundaries[-1] == out.shape[1] - 1
        assert torch.equal(
            model.generate(said, **given(cache), **OPTIONS), model.generate(said, **given(plain), **OPTIONS)
        )


@pytest.mark.parametrize("system", ["", "Answer from the text."])
def test_questions_about_a_document(model: Any, tokenizer: Any, system: str) -> None:
    store, before = MemoryStore(), [{"role": "system", "content": system}] if system else []
    for turn in range(2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            ids = chat_document(tokenizer, DOCUMENT, system=system)
            report = cache.prefill(ids)
            assert (report.tails_loaded, report.tails_computed) == (turn, 1 - turn)
            for question in ("When did it open?", "(and why?)", "7 or 8?"):
                whole, _ = chat_prompt(tokenizer, [*before, user(f"{DOCUMENT}\n\n{question}")])
                with forwards(model) as seen:
                    out = model.generate(whole, **given(copy.deepcopy(cache)), **OPTIONS)
                assert seen[0] == whole.shape[1] - ids.shape[1]
                assert torch.equal(out, without_cache(model, whole))


def test_boundaries_are_where_the_template_keeps_what_is_before(tokenizer: Any) -> None:
    messages = [user("One."), {"role": "assistant", "content": "<think>hm</think>Two."}, user("Three."), user("Four.")]
    forgetful = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.index > messages|length - 2 else '' }}{% endfor %}"
    )
    strict = (
        "{% if messages[0].role == 'user' and messages|length < 2 %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    )
    ids, boundaries = chat_prompt(tokenizer, messages)
    assert len(boundaries) == 4
    assert boundaries == sorted(set(boundaries))
    assert boundaries[-1] < ids.shape[1]
    assert chat_prompt(tokenizer, messages, chat_template=forgetful).boundaries == []
    assert len(chat_prompt(tokenizer, messages, chat_template=strict).boundaries) == 3


@pytest.mark.fault(
    "Prompt",
    "A chat is asked for with a model that has no chat template.",
    "One sentence says so, in Python and on the command line.",
)
@pytest.mark.parametrize("how", ["document", "prompt", "command"])
def test_a_model_without_a_template(tmp_path: Path, how: str) -> None:
    tokenizer = load_tokenizer(str(RECALL_TINY))
    tokenizer.chat_template = None
    if how == "command":
        file = tmp_path / "text.txt"
        file.write_text(DOCUMENT)
        result = CliRunner().invoke(
            app, ["warm", str(RECALL_TINY), str(file), "--store", str(tmp_path / "s"), "--chat"]
        )
        assert result.exit_code == 2
        assert "This tokenizer has no chat template" in " ".join(result.stderr.split())
        return
    with pytest.raises(CakeError, match="This tokenizer has no chat template"):
        chat_document(tokenizer, DOCUMENT) if how == "document" else chat_prompt(tokenizer, [user("Who?")])


def warm_arguments(file: Path, store: Path, model: Path = RECALL_TINY) -> list[str]:
    """The command line that warms a text with the small model."""
    options = ["--store", str(store), "--dtype", "float32", "--chunk-size", str(CHUNK)]
    return ["warm", str(model), str(file), *options]


def test_warm_with_chat(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command has stored is all that a process with a new cache has before the question."""
    monkeypatch.setenv("COLUMNS", "80")
    folder = Path(shutil.copytree(RECALL_TINY, tmp_path / "model"))
    tokenizer.save_pretrained(folder)
    file, system, store = tmp_path / "text.txt", tmp_path / "system.txt", tmp_path / "store"
    file.write_text(DOCUMENT)
    system.write_text("Be brief.")
    arguments = warm_arguments(file, store, folder)
    result = CliRunner().invoke(app, [*arguments, "--chat", "--system", str(system)])
    assert result.exit_code == 0, result.output
    assert "chat_document" in result.output
    assert "model.generate(**inputs, cache=cache)" in map(str.strip, result.output.splitlines())
    assert "finds none of this" not in result.output
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        report = cache.prefill(chat_document(tokenizer, DOCUMENT, system="Be brief."))
        assert (report.chunks_computed, report.tails_loaded, report.tails_computed) == (0, 1, 0)
    without = CliRunner().invoke(app, arguments)
    assert "finds none of this" in without.output
    refused = CliRunner().invoke(app, [*arguments, "--system", str(system)])
    assert refused.exit_code == 2
    assert "--system is for --chat" in " ".join(refused.stderr.split())


def test_warm_with_prompt(model: Any, tmp_path: Path) -> None:
    file, store = tmp_path / "text.txt", tmp_path / "store"
    file.write_text(DOCUMENT)
    arguments = warm_arguments(file, store)
    assert CliRunner().invoke(app, [*arguments, "--prompt"]).exit_code == 0
    ids = load_tokenizer(str(RECALL_TINY))(DOCUMENT, return_tensors="pt").input_ids
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        report = cache.prefill(ids)
        assert (report.chunks_computed, report.tails_loaded, report.tails_computed) == (0, 1, 0)
