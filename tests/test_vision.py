"""Prompts with images: keys cover the pixels, every family is exact, and what cannot be cut is computed as it comes."""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

from cake_hf import CakeCache, Limits, MemoryStore
from cake_hf.keys import chunk_keys
from cake_hf.model.images import UnreadImages
from cake_hf.model.vision import look_at
from family_runs import Run, Verdict, difference
from models import CHUNK
from naming import given
from paces import in_ranges, no, told
from test_gated import BadRange
from vision_models import (
    MAIN,
    PLACE,
    QWEN,
    VISION,
    Parts,
    inputs_for,
    pixels_of,
    standard_parts,
    tokens_of,
    vision_model,
)
from vision_runs import (
    CHUNKS,
    Inputs,
    ask,
    counting_images,
    examine_vision,
    expected,
    fill,
    filled,
    one_by_one,
    oracle,
    standard,
)

TABLE = Path(__file__).parent.parent / "docs" / "families.md"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers says about configs as small as these
    pytest.mark.skipif(
        "mm_encoder_outputs" not in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters,
        reason="this version of transformers cannot be given a part of an image, so prompts with images are computed",
    ),
]


def rows() -> dict[str, Verdict]:
    table = TABLE.read_text().split("<!-- images: made by scripts/families.py -->")[1].split("<!-- images end -->")[0]
    cells = re.findall(r"^\| (\S+) \| (.*?) \| (.*?) \| (.*?) \|$", table, flags=re.MULTILINE)
    return {name: Verdict(layers, way, reason) for name, layers, way, reason in cells if name != "family"}


@pytest.mark.parametrize("family", VISION)
def test_family(family: str) -> None:
    assert rows()[family] == examine_vision(family), "make docs/families.md anew: python scripts/families.py"


def test_the_table_has_these_families() -> None:
    assert list(rows()) == list(VISION)


def warm(family: str, store: MemoryStore, inputs: Inputs, **settings: Any) -> CakeCache:
    """Run a prompt on what is stored, check it bit for bit, and return the closed cache, for its report."""
    settings = {"strategy": "load", "save": False, **settings}
    with CakeCache(vision_model(family), store, chunk_size=CHUNK, **settings) as cache:
        run = ask(family, cache, inputs)
    assert difference(run, oracle(family, inputs)) == ""
    return cache


def found(family: str, store: MemoryStore, inputs: Inputs) -> int:
    """How many chunks of a prompt are loaded."""
    return warm(family, store, inputs).report.chunks_loaded


def with_image(family: str, parts: Parts, old: str, new: str) -> Parts:
    assert tokens_of(family, old) == tokens_of(family, new)
    return tuple(new if part == old else part for part in parts)


def first_chunk_of(family: str, image: str) -> int:
    """The chunk in which an image of the standard prompt begins."""
    parts = standard_parts(family)
    before = parts[: parts.index(image)]
    return sum(part if isinstance(part, int) else tokens_of(family, part) for part in before) // CHUNK


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("image", ["A", "B"])
def test_another_image_misses_from_where_it_begins(family: str, image: str) -> None:
    other = inputs_for(family, with_image(family, standard_parts(family), image, f"{image}2"))
    assert torch.equal(other["input_ids"], standard(family)["input_ids"])
    assert found(family, filled(family), other) == first_chunk_of(family, image)


@pytest.mark.parametrize("family", VISION)
def test_one_changed_pixel_misses(family: str) -> None:
    inputs = {name: tensor.clone() for name, tensor in standard(family).items()}
    inputs["pixel_values"].view(-1)[5] += 1e-3
    assert found(family, filled(family), inputs) == first_chunk_of(family, "A")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_same_patches_in_another_grid_miss(family: str) -> None:
    inputs = dict(standard(family))
    inputs["image_grid_thw"] = inputs["image_grid_thw"].flip(0)
    assert not torch.equal(inputs["image_grid_thw"], standard(family)["image_grid_thw"])
    assert found(family, filled(family), inputs) == first_chunk_of(family, "A")


@pytest.mark.parametrize("family", MAIN)
def test_what_prompts_share_is_found_up_to_where_they_part(family: str) -> None:
    start, first, between, _, _ = standard_parts(family)
    assert isinstance(between, int)
    store = filled(family)
    assert found(family, store, inputs_for(family, (start, first, between + 60))) == first_chunk_of(family, "B")
    assert found(family, store, inputs_for(family, (start, first, between, "B2", 40, "A", 9))) == first_chunk_of(
        family, "B"
    )
    assert found(family, store, inputs_for(family, (start, first, between, "B", 100))) == CHUNKS


@pytest.mark.parametrize("family", MAIN)
def test_the_same_image_elsewhere_misses(family: str) -> None:
    start, *rest = standard_parts(family)
    assert isinstance(start, int)
    moved = inputs_for(family, (start + CHUNK, *rest))
    # Text that is the same up to the image's place, and then not.
    assert found(family, filled(family), moved) == first_chunk_of(family, "A")


@pytest.mark.parametrize("family", MAIN)
def test_text_before_an_image_is_found_from_a_prompt_of_text(family: str) -> None:
    store = MemoryStore()
    fill(family, store, inputs_for(family, (6 * CHUNK,)))
    start = 5 * CHUNK + 2
    assert found(family, store, inputs_for(family, (start, "A", 40))) == 5


@pytest.mark.parametrize("family", MAIN)
def test_text_alone_is_restored(family: str) -> None:
    store, text = MemoryStore(), inputs_for(family, (6 * CHUNK + 7,))
    with CakeCache(vision_model(family), store, chunk_size=CHUNK) as cold:
        assert difference(ask(family, cold, text), oracle(family, text)) == ""
        assert cold.flush(60)
    assert found(family, store, text) == CHUNKS


@pytest.mark.parametrize("family", MAIN)
def test_only_images_with_tokens_to_be_computed_are_seen(family: str) -> None:
    first, second = filled(family), inputs_for(family, (*standard_parts(family)[:-1], 60, "A3", 9))
    with counting_images(vision_model(family)) as seen:
        with CakeCache(vision_model(family), first, chunk_size=CHUNK, strategy="load") as cache:
            ask(family, cache, second)
        assert cache.report.chunks_loaded == CHUNKS
        assert len(seen) == 1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_bfloat16(family: str) -> None:
    model = vision_model(family, torch.bfloat16)
    store = MemoryStore()
    reference = oracle(family, standard(family), model)
    for loaded in (0, CHUNKS):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            run = ask(family, cache, standard(family), model)
            assert cache.flush(60)
        assert difference(run, reference) == ""
        assert cache.report.chunks_loaded == loaded


def test_images_are_embedded_one_by_one() -> None:
    """Several at once round differently here, so that an image's KV would depend on the others of its prompt."""
    family = "internvl"
    model: Any = vision_model(family)
    together = ask(family, DynamicCache(config=model.config), standard(family), prefill_chunk_size=CHUNK)
    assert difference(together, expected(family)) == "logits"
    assert torch.allclose(together.logits, expected(family).logits, atol=1e-3)
    assert difference(warmed := ask_warm(family), expected(family)) == "", warmed


def ask_warm(family: str) -> Run:
    with CakeCache(vision_model(family), filled(family), chunk_size=CHUNK, save=False) as cache:
        return ask(family, cache, standard(family))


KEYS_ELSEWHERE = """
import sys, warnings
warnings.simplefilter("ignore")
from cake_hf import MemoryStore
from vision_runs import fill, standard
for family in sys.argv[1:]:
    store = MemoryStore()
    fill(family, store, standard(family))
    print(family, *sorted(store.keys()))
"""


def test_another_process_finds_the_same_keys() -> None:
    here = [" ".join([family, *sorted(filled(family).keys())]) for family in MAIN]
    paths = [entry for entry in sys.path if entry]
    elsewhere = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{KEYS_ELSEWHERE}", *MAIN],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert elsewhere.stdout.splitlines() == here, elsewhere.stderr


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_other_positions_miss(family: str) -> None:
    text = inputs_for(family, (6 * CHUNK + 7,))
    store, moved = MemoryStore(), torch.arange(6 * CHUNK + 7).expand(4, 1, -1).clone()
    fill(family, store, text)
    moved[2, :, 2 * CHUNK + 3 :] += 5
    assert found(family, store, {**text, "position_ids": moved}) == 2


def test_types_of_tokens_miss_where_they_are_not_given() -> None:
    family = "gemma3"
    text = inputs_for(family, (6 * CHUNK + 7,))
    store = MemoryStore()
    fill(family, store, text)
    assert found(family, store, {"input_ids": text["input_ids"]}) == 0


@pytest.mark.parametrize("family", MAIN)
def test_images_side_by_side(family: str) -> None:
    between = () if family == "gemma3" else (1,)  # Qwen's processor puts a token in front of each
    inputs, store = inputs_for(family, (2 * CHUNK + 3, "A", *between, "B", *between, "A", 50)), MemoryStore()
    chunks = inputs["input_ids"].shape[1] // CHUNK
    fill(family, store, inputs)
    assert found(family, store, inputs) == chunks
    other = inputs_for(family, (2 * CHUNK + 3, "B", *between, "A", *between, "A", 50))
    assert torch.equal(inputs["input_ids"], other["input_ids"])
    assert found(family, store, other) == 2


@pytest.mark.parametrize("family", MAIN)
def test_numerics_may_be_left_out_of_the_namespace(family: str) -> None:
    store = MemoryStore()
    fill(family, store, standard(family), exact=False)
    assert warm(family, store, standard(family), exact=False).report.chunks_loaded == CHUNKS


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("number", range(2))
def test_an_image_is_seen_in_the_middle_of_a_forward(family: str, number: int) -> None:
    """The load of the first chunk, with an image in it, fails layer by layer while the last piece waits for it."""
    inputs, store = inputs_for(family, (4, "A", 6 * CHUNK)), MemoryStore()
    fill(family, store, inputs)
    bad = BadRange(store, number, "flip")
    with CakeCache(
        vision_model(family),
        bad,
        chunk_size=CHUNK,
        save=False,
        strategy="load",
        limits=Limits.from_environment(loader_threads=1),
        rules=told(no, ranges=in_ranges(2)),
    ) as cache:
        with counting_images(vision_model(family)) as seen:
            run = ask(family, cache, inputs)
        assert len(seen) == 1
    assert difference(run, oracle(family, inputs)) == ""
    assert (cache.report.chunks_failed, cache.report.chunks_computed) == (1, 1)


# An image that must not be cut.


def in_uncut_pieces(family: str, inputs: Inputs, chunks: int) -> torch.Tensor:
    """The last logits, where so many chunks are run and then all the rest in one piece."""
    model = vision_model(family)
    inputs = one_by_one(model, family, inputs)
    ids, types, features = inputs["input_ids"], inputs["token_type_ids"], inputs["mm_encoder_outputs"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for chunk in range(chunks):
            end = (chunk + 1) * CHUNK
            model(input_ids=ids[:, end - CHUNK : end], **given(cache), token_type_ids=types[:, :end])
        result = model(
            input_ids=ids[:, chunks * CHUNK :],
            **given(cache),
            token_type_ids=types,
            mm_encoder_outputs=features,
            logits_to_keep=1,
        )
    logits: torch.Tensor = result.logits[:, -1]
    return logits


def test_an_image_whose_tokens_see_each_other_is_not_cut() -> None:
    family, parts = "gemma3", (3 * CHUNK - 2, "A", 60)
    model, inputs, store = vision_model(family), inputs_for(family, parts), MemoryStore()
    reference = in_uncut_pieces(family, inputs, chunks=2)
    plain = ask(family, DynamicCache(config=model.config), inputs)
    for loaded in (0, 2):
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load") as cache:
            run = ask(family, cache, inputs)
            assert cache.flush(60)
        assert torch.equal(run.logits[0], reference)
        assert torch.allclose(run.logits, plain.logits, atol=1e-3)
        assert torch.equal(run.tokens, plain.tokens)
        assert cache.report.chunks_loaded == loaded
        assert cache.report.reason_code == "image-across-chunks"
    # Why: the library's own chunked prefill cuts the image, and computes something else.
    assert not torch.allclose(oracle(family, inputs).logits, plain.logits, atol=1e-3)


def test_an_image_at_once_in_the_way_leaves_the_prompt_as_it_is() -> None:
    family = "gemma3"
    model, inputs = vision_model(family), inputs_for(family, (CHUNK - 2, "A", 60))
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        run = ask(family, cache, inputs)
    assert difference(run, ask(family, DynamicCache(config=model.config), one_by_one(model, family, inputs))) == ""
    assert cache.report.chunks_saved == 0


def test_extra_hashes_are_part_of_keys() -> None:
    namespace, tokens = "0" * 40, list(range(48))
    plain = chunk_keys(namespace, tokens, 16)
    assert chunk_keys(namespace, tokens, 16, extra_hashes=[b"", b"", b""]) == plain
    marked = chunk_keys(namespace, tokens, 16, extra_hashes=[b"", b"x", b""])
    assert marked[0] == plain[0]
    assert len({*plain, *marked}) == 5
    assert chunk_keys(namespace, tokens, 16, extra_hashes=[b"", b"y", b""])[1] != marked[1]


# What is computed as it comes.


def computed(family: str, reason: str, inputs: Inputs, **options: Any) -> None:
    """It is as with a `DynamicCache`, nothing is stored, and the report says why."""
    model, store = vision_model(family), MemoryStore()
    plain = ask(family, DynamicCache(config=model.config), inputs, **options)
    with CakeCache(model, store, chunk_size=CHUNK) as cache:
        run = ask(family, cache, inputs, **options)
        assert cache.flush(60)
    assert difference(run, plain) == ""
    assert reason in cache.report.reason
    assert list(store.keys()) == []


@pytest.mark.parametrize("family", MAIN)
def test_a_batch_with_images_is_computed(family: str) -> None:
    one = standard(family)
    both = {name: torch.cat([tensor, tensor]) for name, tensor in one.items()}
    computed(family, "a batch with images", both)


@pytest.mark.parametrize("family", MAIN)
def test_beams_over_images_are_computed(family: str) -> None:
    computed(family, "a batch with images", inputs_for(family, (20, "A", 40)), num_beams=2)


@pytest.mark.parametrize("family", MAIN)
def test_padding_before_images_is_computed(family: str) -> None:
    inputs = dict(standard(family))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][:, :3] = 0
    computed(family, "a batch with images", inputs)


@pytest.mark.parametrize("family", MAIN)
def test_features_are_computed(family: str) -> None:
    computed(family, "features", one_by_one(vision_model(family), family, standard(family)))


@pytest.mark.parametrize("family", MAIN)
def test_a_prefill_in_chunks_of_the_users_is_computed(family: str) -> None:
    run, plain = (
        ask(family, make(), standard(family), prefill_chunk_size=CHUNK)
        for make in (
            lambda: CakeCache(vision_model(family), MemoryStore(), chunk_size=CHUNK),
            lambda: DynamicCache(config=vision_model(family).config),
        )
    )
    assert difference(run, plain) == ""


@pytest.mark.parametrize("family", MAIN)
def test_places_without_images_are_not_restored(family: str) -> None:
    inputs = standard(family)
    with CakeCache(vision_model(family), MemoryStore(), chunk_size=CHUNK) as cache:
        report = cache.prefill(inputs["input_ids"])
    assert report.reason_code == "images-missing"
    text = {"input_ids": inputs["input_ids"]}
    computed(family, "no images come with it", text)


@pytest.mark.parametrize("family", VISION)
def test_too_few_images_are_the_models_to_complain_about(family: str) -> None:
    inputs = dict(standard(family))
    inputs["pixel_values"] = pixels_of(family, "A")
    if family in QWEN:
        inputs["image_grid_thw"] = inputs["image_grid_thw"][:1].repeat(2, 1)
    errors = []
    for make in (
        lambda: CakeCache(vision_model(family), MemoryStore(), chunk_size=CHUNK),
        lambda: DynamicCache(config=vision_model(family).config),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever the model raises
            ask(family, make(), inputs)
        errors.append((caught.type, str(caught.value)))
    if family in ("llava", "gemma3", "internvl"):  # as many places as two images: by ours, one of as many tokens
        assert "places for it" in errors[0][1]
    else:
        assert errors[0] == errors[1]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_are_computed(family: str) -> None:
    inputs = inputs_for(family, (20, "A", 60))
    inputs["input_ids"] = inputs["input_ids"].where(inputs["input_ids"] != PLACE, PLACE + 1)
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    inputs["video_grid_thw"] = inputs.pop("image_grid_thw")
    inputs["mm_token_type_ids"] *= 2
    computed(family, "videos", inputs)


@pytest.mark.parametrize("family", MAIN)
def test_candidates_looked_up_in_a_prompt_with_images(family: str) -> None:
    model = vision_model(family)
    plain = ask(family, DynamicCache(config=model.config), standard(family), prompt_lookup_num_tokens=3)
    with CakeCache(model, filled(family), chunk_size=CHUNK, strategy="load") as cache:
        run = ask(family, cache, standard(family), prompt_lookup_num_tokens=3)
    assert torch.equal(run.tokens, plain.tokens)
    assert cache.report.chunks_loaded >= CHUNKS - 1


@pytest.mark.parametrize("family", MAIN)
def test_images_without_places_are_the_models_to_complain_about(family: str) -> None:
    text = inputs_for(family, (4 * CHUNK,))
    extra = {name: inputs_for(family, (20, "A"))[name] for name in ("pixel_values", "image_grid_thw") if family in QWEN}
    inputs = {**text, **(extra or {"pixel_values": pixels_of(family, "A")})}
    errors = []
    for make in (
        lambda: CakeCache(vision_model(family), MemoryStore(), chunk_size=CHUNK),
        lambda: DynamicCache(config=vision_model(family).config),
    ):
        with pytest.raises(ValueError, match="do not match") as caught:
            ask(family, make(), inputs)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_a_forward_that_takes_no_embedded_images_is_left_alone() -> None:
    """As those of older versions of transformers."""
    model, inputs = vision_model("gemma3"), standard("gemma3")
    older, newer = (look_at(model, inputs, 0, frozenset(names)) for names in ([], ["mm_encoder_outputs"]))
    assert older is not None
    assert newer is not None
    refused = older.refusal(is_batch=False)
    assert refused is not None
    assert refused.code == "image-parts"
    assert newer.refusal(is_batch=False) is None


def test_positions_that_follow_from_images_are_not_guessed() -> None:
    family = "qwen2_5_vl"
    model, inputs = vision_model(family), standard(family)
    logits = []
    for make in (lambda: CakeCache(model, MemoryStore(), chunk_size=CHUNK), lambda: DynamicCache(config=model.config)):
        model.model.rope_deltas = None
        cache = make()
        with torch.no_grad():
            logits.append(model(**inputs, **given(cache), logits_to_keep=1).logits)
        if isinstance(cache, CakeCache):
            assert cache.report.reason_code == "image-positions"
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_pixels_may_come_straight_to_the_model(family: str) -> None:
    model, inputs = vision_model(family), standard(family)
    with CakeCache(model, filled(family), chunk_size=CHUNK, strategy="load") as cache, torch.no_grad():
        logits = model(**inputs, **given(cache), logits_to_keep=1).logits
    assert cache.report.chunks_loaded == CHUNKS
    assert torch.equal(logits[:, -1], expected(family).logits[0])


# What the model keeps on itself.


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_prompt_of_text_is_not_numbered_by_the_images_before(family: str) -> None:
    model, text = vision_model(family), inputs_for(family, (6 * CHUNK + 7,))
    reference = oracle(family, text)
    ask(family, DynamicCache(config=model.config), standard(family))
    assert model.model.rope_deltas.item() != 0
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with torch.no_grad():
            model(text["input_ids"], **given(cache), logits_to_keep=1)
        assert cache.report.reason_code == "stale-positions"
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        cache.prefill(text["input_ids"])
        assert cache.report.chunks_computed == CHUNKS
        assert difference(ask(family, cache, text), reference) == ""


@pytest.mark.parametrize("family", MAIN)
def test_a_second_turn_goes_on_where_the_first_one_ended(family: str) -> None:
    model, first = vision_model(family), standard(family)
    embedded = one_by_one(model, family, first)
    plain = DynamicCache(config=model.config)
    one = ask(family, plain, embedded, prefill_chunk_size=CHUNK)
    more = inputs_for(family, (40,), seed=5)["input_ids"]
    second = {"input_ids": torch.cat([one.tokens, more], dim=1)}
    other = ask(family, plain, second, prefill_chunk_size=CHUNK)
    for _ in range(2):
        with CakeCache(model, filled(family), chunk_size=CHUNK) as cache:
            assert difference(ask(family, cache, first), one) == ""
            assert difference(ask(family, cache, second), other) == ""


def test_a_second_turn_may_bring_an_image() -> None:
    """Of the families here, transformers lets only some go on with new images; Qwen's positions need all of them again."""
    family = "gemma3"
    model, first = vision_model(family), standard(family)
    results = []
    for make in (lambda: CakeCache(model, filled(family), chunk_size=CHUNK), lambda: DynamicCache(config=model.config)):
        cache = make()
        cut = {} if isinstance(cache, CakeCache) else {"prefill_chunk_size": CHUNK}
        embed = (
            (lambda inputs: inputs)
            if isinstance(cache, CakeCache)
            else (lambda inputs: one_by_one(model, family, inputs))
        )
        one = ask(family, cache, embed(first), **cut)
        more = inputs_for(family, (20, "C", 30), seed=5)
        second = {
            "input_ids": torch.cat([one.tokens, more["input_ids"]], dim=1),
            "token_type_ids": torch.cat([torch.zeros_like(one.tokens), more["token_type_ids"]], dim=1),
            "pixel_values": more["pixel_values"],
        }
        results.append(ask(family, cache, embed(second), **cut))
        if isinstance(cache, CakeCache):
            assert cache.report.chunks_computed == 3
            cache.close()
    assert difference(*results) == ""


# The model is left as it was.


@pytest.mark.parametrize("family", MAIN)
def test_the_model_is_its_own_again_afterwards(family: str) -> None:
    model = VISION[family]().eval()
    before = set(vars(model))
    cache = CakeCache(model, MemoryStore(), chunk_size=CHUNK)
    assert set(vars(model)) != before
    # Another cache is none of our business.
    plain = ask(family, DynamicCache(config=model.config), standard(family), model)
    cache.close()
    assert set(vars(model)) == before
    assert difference(plain, ask(family, DynamicCache(config=model.config), standard(family), model)) == ""


def test_a_copy_of_the_model_sees_with_its_own_eyes() -> None:
    family = "qwen2_5_vl"
    model = vision_model(family)
    with CakeCache(model, MemoryStore(), chunk_size=CHUNK):
        other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.model.visual.parameters():
            parameter.mul_(1.5)
    with CakeCache(other, MemoryStore(), chunk_size=CHUNK) as cache:
        run = ask(family, cache, standard(family), other)
    assert difference(run, oracle(family, standard(family), other)) == ""
    assert difference(run, expected(family)) != ""


@pytest.mark.parametrize("family", MAIN)
def test_a_vision_part_that_fails_leaves_an_empty_cache(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = vision_model(family), inputs_for(family, (4 * CHUNK + 2, "A", 7))
    reference = oracle(family, inputs)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory for images")

    with CakeCache(model, MemoryStore(), chunk_size=CHUNK) as cache:
        with monkeypatch.context() as patch:
            patch.setattr(type(model.model), "get_image_features", fail)
            with pytest.raises(RuntimeError, match="no memory for images"):
                ask(family, cache, inputs)
        assert cache.get_seq_length() == 0
        assert difference(ask(family, cache, inputs), reference) == ""


def test_unread_images_are_the_vision_parts_output_to_all_callers() -> None:
    family = "qwen3_vl"
    model, inputs = vision_model(family), standard(family)
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad(), counting_images(model) as seen:
        unread = UnreadImages(model, given)
        assert not seen
        output = model.model.get_image_features(**given, return_dict=True)
        assert all(map(torch.equal, unread.pooler_output, output.pooler_output))
        assert all(map(torch.equal, unread["pooler_output"], output["pooler_output"]))
        assert len(unread.deepstack_features) == len(output.deepstack_features) == 2
        assert len(seen) == 2


def test_the_kernels_of_the_vision_part_are_in_the_namespace() -> None:
    family = "qwen2_5_vl"
    model = copy.deepcopy(vision_model(family))
    store = MemoryStore()
    fill(family, store, standard(family), model)
    for implementation, loaded in (({"vision_config": "eager"}, 0), ({"vision_config": "sdpa"}, CHUNKS)):
        model.set_attn_implementation(implementation)
        with CakeCache(model, store, chunk_size=CHUNK, strategy="load", save=False) as cache:
            ask(family, cache, standard(family), model)
        assert cache.report.chunks_loaded == loaded
