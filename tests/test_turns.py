"""Turns of a conversation in one cache are stored, replies included, and another process restores all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import cake_hf
from cake_hf import CakeCache, MemoryStore
from cut_runs import pieces, run_piece
from families import family_model, here
from family_runs import Run, difference, generate
from models import CHUNK, build, prompt, run_ahead, shared_model
from naming import given
from test_changed_models import CHANGES, Change, embedding_of_one_token, weight_edited_behind_torchs_back
from test_cuts import OPTIONS, any_model, forwards

MODELS = ["llama float32", "llama bfloat16", *here("gemma3", "qwen3_next", "falcon_h1", "deepseek_v3")]
MESSAGES = (20, 9, 40, 1, 2 * CHUNK)
REPLY = 6

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these


def talk(model: Any, cache: Any, messages: tuple[int, ...] = MESSAGES) -> list[Run]:
    """A conversation: what each turn gave."""
    said, turns = torch.zeros((1, 0), dtype=torch.long), []
    for seed, tokens in enumerate(messages):
        said = torch.cat([said, prompt(tokens, seed=20 + seed)], dim=1)
        if type(cache) is DynamicCache:
            run_ahead(model, said, cache)
        turns.append(generate(model, cache, said, max_new_tokens=REPLY))
        said = turns[-1].tokens
    return turns


def plain(model: Any, messages: tuple[int, ...] = MESSAGES) -> list[Run]:
    return talk(model, DynamicCache(config=model.config), messages)


@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_is_that_of_a_dynamic_cache_and_is_taken_up(name: str) -> None:
    model, store = any_model(name), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        turns = talk(model, cache)
        for turn, (one, other) in enumerate(zip(turns, plain(model), strict=True)):
            assert difference(one, other) == "", f"turn {turn}"
        cuts, length = cache.end_turn(), cache.get_seq_length()
        assert cuts[-1] == length == turns[-1].tokens.shape[1] - 1
        assert cache.report.reason_code != "off-schedule"
    said = torch.cat([turns[-1].tokens, prompt(12, seed=9)], dim=1)
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as other, forwards(model) as seen:
        report = other.prefill(said[:, :length], boundaries=cuts)
        taken = generate(model, other, said, max_new_tokens=REPLY)
        assert (report.chunks_computed, report.tails_computed) == (0, 0), report
        assert seen[0] == 13  # the message, and the reply's last token, which had no KV
    oracle = DynamicCache(config=model.config)
    for start, end in pieces(length, cuts):
        run_piece(model, said, oracle, start, end)
    assert difference(taken, generate(model, oracle, said, max_new_tokens=REPLY)) == ""


@pytest.mark.parametrize("name", ["llama bfloat16", *here("gemma3", "falcon_h1")])
def test_what_the_store_lost_of_a_conversation_is_computed_as_it_was(name: str) -> None:
    """Replies token by token: the bits do not depend on what the store holds."""
    model, store = any_model(name), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        turns = talk(model, cache)
        cuts = cache.end_turn()
    said = torch.cat([turns[-1].tokens, prompt(12, seed=9)], dim=1)
    with CakeCache(model, store, chunk_size=CHUNK, save=False) as warm:
        warm.prefill(said[:, : cuts[-1]], boundaries=cuts)
        expected = generate(model, warm, said)
    for empty in (MemoryStore(), _every_other(store)):
        with CakeCache(model, empty, chunk_size=CHUNK, strategy="load") as cold:
            report = cold.prefill(said[:, : cuts[-1]], boundaries=cuts)
            assert report.tails_computed
            assert difference(generate(model, cold, said), expected) == ""
        assert torch.equal(
            cake_hf.generate(model, said, store=empty, boundaries=cuts, chunk_size=CHUNK, **OPTIONS), expected.tokens
        )


def _every_other(store: MemoryStore) -> MemoryStore:
    copy = MemoryStore()
    for key in sorted(store.keys())[::2]:
        copy.write(key, [store.read(key) or b""])
    return copy


def test_another_process_takes_it_up(tmp_path: Path) -> None:
    model = shared_model("llama", "bfloat16")
    with CakeCache(model, tmp_path, chunk_size=CHUNK) as cache:
        said = talk(model, cache)[-1].tokens
        told = {"said": said.tolist(), "boundaries": cache.end_turn()}
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_turns\n"
        "test_turns.take_up(sys.argv[2], json.load(sys.stdin))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 0]


def take_up(folder: str, told: dict[str, Any]) -> None:
    """What the other process does."""
    with CakeCache(shared_model("llama", "bfloat16"), folder, chunk_size=CHUNK, strategy="load") as cache:
        ids = torch.tensor(told["said"])[:, : told["boundaries"][-1]]
        report = cache.prefill(ids, boundaries=told["boundaries"])
    print(json.dumps([report.chunks_computed, report.tails_computed]))


def test_a_prompt_alone_is_stored_as_before() -> None:
    """The reply was not declared as something that goes on."""
    store = MemoryStore()
    cake_hf.generate(shared_model("llama"), prompt(), store=store, chunk_size=CHUNK, **OPTIONS)
    assert len(list(store.keys())) == prompt().shape[1] // CHUNK


@pytest.mark.fault(
    "KV",
    "A turn goes on from a reply whose KV was edited, cropped, made by several tokens at once, or by a changed model.",
    "Nothing of it is stored, and the prompt goes on as with a `DynamicCache`.",
)
@pytest.mark.parametrize("what", ["edited", "cropped", "looked up", "sampled rows", "retrained"])
def test_what_is_not_known_is_not_stored(what: str) -> None:
    model: Any = family_model("llama") if what == "retrained" else shared_model("llama")
    store = MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        options = {"prompt_lookup_num_tokens": 3} if what == "looked up" else {}
        options |= {"num_beams": 2} if what == "sampled rows" else {}
        said = model.generate(prompt(40, seed=2), **given(cache), **{**OPTIONS, "max_new_tokens": 8, **options})
        if what == "edited":
            cache.layers[0].keys[..., -3:, :] += 1
        if what == "cropped":
            cache.crop(-2)
        if what == "retrained":
            with torch.no_grad():
                model.lm_head.weight += 0.5
        assert cache.flush(60)
        before = set(store.keys())
        ends = cache.end_turn()
        assert cache.flush(60)
        assert set(store.keys()) == before
        assert not ends or ends[-1] <= 2 * CHUNK
        if what == "retrained":
            with torch.no_grad():
                model.lm_head.weight -= 0.5
        assert said.shape[1] == 48


@contextmanager
def weights_and_back(model: Any) -> Iterator[None]:
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        before = weight.clone()
        weight.mul_(2)
        yield
        weight.copy_(before)


@contextmanager
def other_attention(model: Any) -> Iterator[None]:
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation("sdpa")


def autocast(model: Any) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


UNDONE: list[Change] = [
    change for change in CHANGES if change not in (weight_edited_behind_torchs_back, embedding_of_one_token)
] + [weights_and_back, other_attention, autocast]


def turn_under(change: Change, *, by_hand: bool) -> tuple[int, list[int]]:
    """A turn behind a document, run while the model is changed: how many chunks it left in the store, and its cuts."""
    model: Any = build("llama")
    store, document = MemoryStore(), prompt(40, seed=2)
    with CakeCache(model, store, chunk_size=CHUNK) as cache, torch.no_grad():
        cache.prefill(document)
        assert cache.flush(60)
        before = len(list(store.keys()))
        if by_hand:
            model(prompt(5, seed=3), **given(cache), logits_to_keep=1)
        with change(model):
            if by_hand:
                for token in prompt(8, seed=4)[0]:
                    model(token.view(1, 1), **given(cache), logits_to_keep=1)
            else:
                said = torch.cat([document, prompt(5, seed=3)], dim=1)
                model.generate(said, **given(cache), **{**OPTIONS, "max_new_tokens": 8})
        ends = cache.end_turn()
        assert cache.flush(60)
        return len(list(store.keys())) - before, ends


@pytest.mark.fault(
    "Model",
    "The model is changed while a turn runs (steered, another adapter, autocast), and is as before when the turn ends.",
    "Nothing of that turn is stored.",
)
@pytest.mark.parametrize("by_hand", [False, True], ids=["generate", "token by token"])
@pytest.mark.parametrize("change", UNDONE, ids=lambda change: change.__name__)
def test_a_turn_of_a_model_that_was_changed_meanwhile(change: Change, by_hand: bool) -> None:
    stored, ends = turn_under(change, by_hand=by_hand)
    assert stored == 0
    assert not ends or ends[-1] <= 40


@pytest.mark.parametrize("by_hand", [False, True], ids=["generate", "token by token"])
def test_a_turn_of_an_unchanged_model_is_stored(by_hand: bool) -> None:
    """The negative control of the one above."""
    stored, ends = turn_under(lambda model: nullcontext(), by_hand=by_hand)
    assert stored
    assert ends[-1] > 40


@pytest.mark.fault(
    "Prompt",
    "What follows a document in a cache has positions, or a mask, of its own.",
    "It is computed as it comes, and nothing of it is stored.",
)
@pytest.mark.parametrize(
    "how",
    [
        {"position_ids": torch.arange(140, 145)[None]},
        {"cache_position": torch.arange(140, 145)},
        {"attention_mask": torch.ones(1, 5, dtype=torch.long)},
        {"output_attentions": True},
    ],
    ids=lambda how: next(iter(how)),
)
def test_what_follows_a_document_otherwise_is_not_stored(how: dict[str, Any]) -> None:
    model, store = shared_model("llama"), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache, torch.no_grad():
        cache.prefill(prompt(40, seed=2))
        assert cache.flush(60)
        before = set(store.keys())
        model(prompt(5, seed=3), **given(cache), logits_to_keep=1, **how)
        assert cache.end_turn()[-1:] in ([], [40])
        assert cache.flush(60)
        assert set(store.keys()) == before


@pytest.mark.fault(
    "Prompt",
    "A question after `prefill` fails by an argument that the model does not take.",
    "The error reaches the caller; the model's other prompts are restored as before.",
)
def test_a_question_that_fails_is_that_questions_fault_alone() -> None:
    model, store = shared_model("llama"), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache, torch.no_grad():
        cache.prefill(prompt(40, seed=2))
        with pytest.raises(TypeError):
            model(prompt(5, seed=3), **given(cache), logits_to_keep=1, position_ids="none")
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
        report = cache.prefill(prompt(40, seed=2))
        assert (report.chunks_loaded, report.tails_loaded, report.reason) == (2, 1, "")


@pytest.mark.fault(
    "Prompt",
    "The next turn tells a reply in other tokens than were decoded.",
    "It goes on as with a `DynamicCache`, and nothing of it is stored.",
)
def test_a_reply_that_is_told_otherwise() -> None:
    model, store = shared_model("llama"), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        said = generate(model, cache, prompt(30)).tokens
        said[0, 31] = (said[0, 31] + 1) % 100 + 3
        said = generate(model, cache, torch.cat([said, prompt(40)], dim=1)).tokens
        assert cache.report.reason_code == "off-schedule"
        assert cache.end_turn() == []
        assert cache.flush(60)
    assert len(list(store.keys())) == 1


def test_a_reply_that_prefill_is_told_otherwise() -> None:
    model = shared_model("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        said = generate(model, cache, prompt(30)).tokens
        said[0, 31] = (said[0, 31] + 1) % 100 + 3
        assert cache.prefill(torch.cat([said, prompt(40)], dim=1)).reason_code == "off-schedule"
