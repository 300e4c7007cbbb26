"""A declared end of a document is a cut: the tail before it is stored, and nothing depends on what the store holds."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import cake_hf
import models
from cake_hf import CakeCache, CakeError, MemoryStore, reads_only
from cake_hf.blocks import blocks, suffix_start
from cake_hf.chunks.codec import check_file, parse_header
from cake_hf.keys import block_keys, chunk_keys, namespace_digest
from cake_hf.testing import FaultStore
from cut_runs import in_pieces, pieces
from families import family_model, here
from family_runs import NEW_TOKENS, content, difference, generate
from models import CHUNK, prompt, shared_model
from naming import given as cache_given
from stored import without

FAMILIES = here("gemma3", "mistral", "qwen3_next", "falcon_h1", "lfm2", "deepseek_v3")
OPTIONS = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says about configs as small as these


def document(chunks: int = 3, rest: int = 7) -> torch.Tensor:
    return prompt(chunks * CHUNK + rest, seed=5)


def asking(ids: torch.Tensor, tokens: int = 9, seed: int = 6) -> torch.Tensor:
    return torch.cat([ids, prompt(tokens, seed=seed)], dim=1)


def any_model(name: str) -> Any:
    family, _, dtype = name.partition(" ")
    return shared_model(family, dtype) if dtype else family_model(family)


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """How many tokens each forward has brought."""
    seen: list[int] = []
    hook = reads_only(lambda module, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).shape[1]))
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


MODELS = ["llama float32", "llama bfloat16", "qwen3 bfloat16", *FAMILIES]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("chunks", "rest", "question"), [(3, 7, 9), (3, 1, 2), (2, 0, 5), (0, 5, 3), (1, 15, 40)])
def test_a_document_and_its_questions(name: str, chunks: int, rest: int, question: int) -> None:
    """Cold, in the same process, warm, and with a hole where its tail was; always the bits of the same pieces."""
    model, ids = any_model(name), document(chunks, rest)
    store = MemoryStore()
    for turn in ("cold", "warm", "hole"):
        found = without(store, len(pieces(ids.shape[1], [])) - 1) if turn == "hole" else store
        with CakeCache(model, found, chunk_size=CHUNK, strategy="load") as cache:
            report = cache.prefill(ids)
            for seed in (6, 7):
                whole = asking(ids, question, seed)
                expected = in_pieces(model, whole, [ids.shape[1]])
                asked = copy.deepcopy(cache)
                with forwards(model) as seen:
                    assert difference(generate(model, asked, whole), expected) == "", f"{turn}, question {seed}"
                tokens = sum(seen) - NEW_TOKENS + 1
                assert tokens == question or (
                    turn != "cold" and tokens == question % CHUNK
                )  # its own chunks are stored
            assert cache.flush(60)
        assert (report.tails_loaded, report.tails_computed) == {"cold": (0, 1), "warm": (1, 0), "hole": (0, 1)}[turn]
        assert report.chunks_loaded == (0 if turn == "cold" else chunks - (rest == 0)) or turn == "hole"


def test_other_cuts_give_other_bits() -> None:
    """The negative control: other cuts are other bits, so that the comparisons above can fail."""
    model, ids = shared_model("llama", "bfloat16"), asking(document())
    assert difference(in_pieces(model, ids, [3 * CHUNK + 7]), in_pieces(model, ids, [])) != ""
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(document())
        assert difference(generate(model, cache, ids), in_pieces(model, ids, [])) != ""


@pytest.mark.fault(
    "Prompt",
    "A prompt goes on from a document whose end was declared, and does not declare it.",
    "It finds the full chunks; the stored tail is not for it, and its bits are those of the undeclared prompt.",
)
@pytest.mark.parametrize("name", ["llama bfloat16", *here("gemma3", "falcon_h1")])
def test_an_undeclared_prompt_is_as_before(name: str) -> None:
    model, store = any_model(name), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(document())
    ids = asking(document(), 20)
    with CakeCache(model, store, chunk_size=CHUNK, save=False) as cache:
        assert difference(generate(model, cache, ids), in_pieces(model, ids, [])) == ""
        assert (cache.report.chunks_missed, cache.report.tails_loaded) == (1, 0)


@pytest.mark.parametrize("name", ["llama bfloat16", *here("gemma3", "falcon_h1")])
def test_the_very_document_is_generated_from(name: str) -> None:
    """A cut at the end of a prompt changes nothing: its last piece is run for the logits."""
    model, store = any_model(name), MemoryStore()
    for rest in (0, 7):
        ids = document(2, rest)
        for _ in range(2):
            with CakeCache(model, store, chunk_size=CHUNK) as cache:
                cache.prefill(ids)
                assert difference(generate(model, cache, ids), in_pieces(model, ids, [])) == ""


@pytest.mark.parametrize("name", MODELS)
def test_boundaries_of_generate(name: str, tmp_path: Path) -> None:
    model, ids = any_model(name), asking(document(), 40)
    cuts = [5, 3 * CHUNK + 7, 3 * CHUNK + 30]
    expected = in_pieces(model, ids, cuts).tokens
    for _ in range(3):
        assert torch.equal(
            cake_hf.generate(model, ids, store=tmp_path, boundaries=cuts, chunk_size=CHUNK, **OPTIONS), expected
        )
    with CakeCache(model, tmp_path, chunk_size=CHUNK, strategy="load") as cache:
        report = cache.prefill(ids[:, : cuts[-1]], boundaries=cuts)
        assert (report.tails_computed, report.chunks_computed) == (0, 0)
        assert difference(generate(model, cache, ids), in_pieces(model, ids, cuts)) == ""


@pytest.mark.parametrize("name", ["llama bfloat16", *here("gemma3", "falcon_h1", "qwen3_next")])
@pytest.mark.parametrize("fault", ["drop", "flip", "error", "truncate"])
def test_tails_that_fail_are_computed(name: str, fault: str) -> None:
    model, ids, store = any_model(name), asking(document(), 30), MemoryStore()
    cuts = [CHUNK + 3, 3 * CHUNK + 7]
    cake_hf.generate(model, ids, store=store, boundaries=cuts, chunk_size=CHUNK, **OPTIONS)
    tails = [key for key in store.keys() if _tokens(store, key) not in (1, CHUNK)]  # noqa: SIM118
    assert len(tails) == 2
    for bad in (tails[:1], tails[1:], tails):
        faulty = FaultStore(store, dict.fromkeys(bad, fault))
        with CakeCache(model, faulty, chunk_size=CHUNK, save=False, strategy="load") as cache:
            cache.prefill(ids[:, : cuts[-1]], boundaries=cuts)
            assert difference(generate(model, cache, ids), in_pieces(model, ids, cuts)) == ""
            assert cache.report.tails_computed >= len(bad)


def _tokens(store: MemoryStore, key: str) -> int:
    _, table = parse_header(store.read(key) or b"")
    return int(next(iter(table.values()))["shape"][0])  # type: ignore[call-overload]


def test_a_tail_at_rest_is_a_chunk_of_fewer_tokens() -> None:
    store = MemoryStore()
    with CakeCache(shared_model("llama"), store, chunk_size=CHUNK) as cache:
        cache.prefill(document())
    sizes = {check_file(store.read(key) or b"", key).index: _tokens(store, key) for key in store.keys()}  # noqa: SIM118
    assert sizes == {0: CHUNK, 1: CHUNK, 2: CHUNK, 3: 7}


CUTS = st.lists(st.integers(1, 60), max_size=4, unique=True).map(sorted)


@settings(max_examples=25, deadline=None)
@drawn(cuts=CUTS, tokens=st.integers(2, 60), question=st.integers(1, 20))
def test_any_cuts_of_any_prompt(cuts: list[int], tokens: int, question: int) -> None:
    """Whatever was declared before in that store, bit for bit the pieces of these cuts."""
    model: Any = shared_model("llama", "bfloat16")
    ids = asking(prompt(tokens, seed=5), question)
    cuts = [cut for cut in cuts if cut <= tokens]
    expected = in_pieces(model, ids, sorted({*cuts, tokens}))
    for _ in range(2):
        with CakeCache(model, SHARED, chunk_size=CHUNK) as cache:
            cache.prefill(ids[:, :tokens], boundaries=cuts)
            assert difference(generate(model, cache, ids), expected) == ""


SHARED = MemoryStore()


@drawn(start=st.integers(0, 40), tokens=st.integers(0, 90), cuts=CUTS, size=st.integers(2, 20))
def test_blocks_follow_each_other(start: int, tokens: int, cuts: list[int], size: int) -> None:
    found = blocks(start, start + tokens, cuts, size)
    assert [token for block in found for token in range(block.start, block.end)] == list(range(start, start + tokens))
    assert all(block.tokens <= size for block in found)
    ends = {end for block in found for _, end in block.forwards}
    assert {cut for cut in cuts if start < cut < start + tokens} <= ends
    assert suffix_start(start, start + tokens, cuts, size, 0) in ends | {start}


@drawn(cuts=CUTS, tokens=st.integers(32, 70))
def test_cuts_on_the_grid_are_none(cuts: list[int], tokens: int) -> None:
    space, ids = namespace_digest("facts"), list(range(tokens))
    plain = chunk_keys(space, ids, 16)
    on_grid = [cut // 16 * 16 for cut in cuts]
    assert block_keys(space, ids, blocks(0, len(plain) * 16, sorted({*on_grid} - {0}), 16), 16) == plain


def test_keys_tell_how_tokens_were_run() -> None:
    """Equal tokens behind equal ones: as a tail, one by one, or as the beginning of a chunk."""
    space, ids = namespace_digest("facts"), list(range(16))
    ways = [blocks(0, 8, (), 16), blocks(0, 8, range(1, 8), 16), blocks(0, 8, [4], 16), blocks(0, 16, (), 16)]
    assert len({block_keys(space, ids, way, 16)[-1] for way in ways}) == 4
    behind = [block_keys(space, ids, blocks(0, 16, cuts, 4), 4)[-1] for cuts in ((), [2], [2, 4], [3])]
    assert len(set(behind)) == 4


BAD = {
    "beyond the prompt": ([500], ValueError, "Boundary 500 is outside the prompt"),
    "nothing": ([0], ValueError, "Boundary 0 is outside the prompt"),
    "negative": ([3, -2], ValueError, "Boundary -2 is outside the prompt"),
    "no number": (["end"], TypeError, "Boundaries are whole numbers"),
    "half a token": ([2.5], TypeError, "Boundaries are whole numbers"),
}


@pytest.mark.fault(
    "Prompt",
    "A boundary is outside the prompt, is no whole number, or belongs to another prompt.",
    "One sentence says so; nothing is computed.",
)
@pytest.mark.parametrize("bad", BAD)
def test_boundaries_that_cannot_be(bad: str) -> None:
    cuts, error, said = BAD[bad]
    model = shared_model("llama")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache, pytest.raises(error, match=said):
        cache.prefill(document(), boundaries=cuts)  # type: ignore[arg-type]
    with pytest.raises(error, match=said):
        cake_hf.generate(model, document(), store=MemoryStore(), boundaries=cuts, **OPTIONS)  # type: ignore[arg-type]


def test_boundaries_of_another_prompt() -> None:
    with CakeCache(shared_model("llama"), MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(document(), boundaries=[20])
        with pytest.raises(CakeError, match="a prompt that was not cut at 25; make a new"):
            cache.prefill(asking(document()), boundaries=[25])
        assert cache.prefill(asking(document()), boundaries=[20]).tails_computed == 1


def test_a_batch_with_boundaries_says_that_it_leaves_them_out() -> None:
    model, rows = models.build("llama"), torch.cat([prompt(40, seed=1), prompt(40, seed=2)])
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(rows)
        assert cache.report.reason_code == "batch-prefill"
    plain = model.generate(rows, **OPTIONS)
    assert torch.equal(
        cake_hf.generate(model, rows, store=MemoryStore(), chunk_size=CHUNK, boundaries=[20], **OPTIONS), plain
    )


def test_another_prompt_than_the_document_in_here() -> None:
    """It shares whole chunks, and goes its own way before the document's end, or just there."""
    model = shared_model("llama", "bfloat16")
    for kept in (3 * CHUNK, 3 * CHUNK + 3, 3 * CHUNK + 7):
        ids = asking(document()[:, :kept], 20)
        with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
            cache.prefill(document())
            assert (
                difference(generate(model, cache, ids), in_pieces(model, ids, [kept] if kept % CHUNK == 7 else []))
                == ""
            )


class Gate(dict[int, Any]):
    """The memo of a copy, which stops in the midst of it: when it is asked about the cache's second layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._layer = layer
        self.reached, self.opened = threading.Event(), threading.Event()

    def __setitem__(self, number: int, value: Any) -> None:
        if number == id(self._layer):
            self.reached.set()
            assert self.opened.wait(60)
        super().__setitem__(number, value)


WAYS_TO_COPY: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "to_dynamic_cache": lambda cache: cache.to_dynamic_cache(),
}


@pytest.mark.fault(
    "KV",
    "Several threads copy one cache at the same time, each for its own question.",
    "Each copy has the whole document, and the original is as it was at any moment.",
)
@pytest.mark.parametrize("way", WAYS_TO_COPY)
@pytest.mark.parametrize("name", ["llama bfloat16", *here("gemma3", "falcon_h1", "deepseek_v32", "qwen3_next")])
def test_questions_at_once(name: str, way: str) -> None:
    """One thread stops in the midst of copying; another copies, and a third looks, meanwhile."""
    model, ids = any_model(name), document()
    whole = asking(ids)
    expected = in_pieces(model, whole, [ids.shape[1]])
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(ids)
        visible = cache.get_seq_length()
        before = content(WAYS_TO_COPY[way](cache))
        gate = Gate(cache.layers[1])
        copies: dict[str, Any] = {}
        first = threading.Thread(target=lambda: copies.update(first=copy.deepcopy(cache, gate)))
        other = threading.Thread(target=lambda: copies.update(other=WAYS_TO_COPY[way](cache)))
        first.start()
        assert gate.reached.wait(60)
        other.start()
        other.join(0.2)  # as far as it comes
        assert cache.get_seq_length() == visible
        gate.opened.set()
        first.join(60)
        other.join(60)
        assert difference(generate(model, copies["first"], whole), expected) == ""
        if way == "deepcopy":
            assert difference(generate(model, copies["other"], whole), expected) == ""
        else:
            found = content(copies["other"])
            assert found.keys() == before.keys()
            assert all(torch.equal(found[n], before[n]) for n in before)
        assert difference(generate(model, cache, whole), expected) == ""


def test_a_copy_in_the_midst_of_another_threads_prompt() -> None:
    """That would be half of it, so it is refused; afterwards it works."""
    model, ids = shared_model("llama"), document()
    reached, opened = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        reached.set()
        assert opened.wait(60)

    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(ids)
        handle = model.model.layers[1].register_forward_pre_hook(reads_only(stop))
        thread = threading.Thread(target=generate, args=(model, cache, asking(ids)))
        thread.start()
        try:
            assert reached.wait(60)
            for way in WAYS_TO_COPY.values():
                with pytest.raises(CakeError, match="Another thread is using this CakeCache"):
                    way(cache)
        finally:
            opened.set()
            thread.join(60)
            handle.remove()
        length = cache.get_seq_length()
        assert [way(cache).get_seq_length() for way in WAYS_TO_COPY.values()] == [length] * 3


@pytest.mark.parametrize(
    "mode", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 3}]
)
def test_other_ways_to_answer_behind_a_document(mode: dict[str, Any]) -> None:
    """Several rows go on from whole chunks, as before; the tokens are those of plain `generate` in any case."""
    model, ids = shared_model("llama"), asking(document())
    torch.manual_seed(0)
    expected = model.generate(ids, **{**OPTIONS, **mode})
    torch.manual_seed(0)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(document())
        assert torch.equal(model.generate(ids, **cache_given(cache), **{**OPTIONS, **mode}), expected)


@pytest.mark.parametrize("stored", [1, 2, 3])
def test_a_document_of_which_only_the_tail_is_new_was_found(stored: int) -> None:
    model, store, ids = shared_model("llama"), MemoryStore(), prompt(3 * CHUNK + 5)
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        cache.prefill(ids[:, : stored * CHUNK], whole=True)
        cache.flush()
    with CakeCache(model, store, chunk_size=CHUNK, strategy="load", save=False) as cache:
        report = cache.prefill(ids)
        assert (report.chunks_loaded, report.tails_computed) == (stored, 1)
        assert report.reason == ""


@pytest.mark.fault(
    "Prompt",
    "An argument has a type of its own, such as a mask for each kind of layer, in a decoding step or with a prompt.",
    "It goes to the model as it is; the model's other prompts are restored as before.",
)
@pytest.mark.parametrize(
    ("name", "value", "decoding"),
    [
        ("attention_mask", {"full_attention": None, "sliding_attention": None}, True),
        ("cache_position", [0, 1, 2], True),
        ("cache_position", [0, 1, 2], False),
    ],
    ids=["a mask for each kind of layer", "a list in a decoding step", "a list with a prompt"],
)
@pytest.mark.parametrize("family", here("gemma3"))
def test_arguments_of_other_types(family: str, name: str, value: Any, decoding: bool) -> None:
    model, store = copy.deepcopy(family_model(family)), MemoryStore()
    with CakeCache(model, store, chunk_size=CHUNK) as cache, torch.no_grad():
        if decoding:
            model(document(), **cache_given(cache), logits_to_keep=1)
        new = prompt(1) if decoding else document()
        model(new, **{name: value}, **cache_given(cache), logits_to_keep=1)
        assert cache.report.reason_code == ("none-stored" if decoding else "positions")
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        assert cache.prefill(document()).reason_code == "none-stored"
