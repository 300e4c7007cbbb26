"""CacheBlend and EPIC: documents stored alone, one behind the other, with a share of their tokens computed again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cake_hf import CakeCache, CakeError, MemoryStore
from cake_hf.presses import EPIC, Blend, BlendReport, CacheBlend, PressedCache
from families import family_model, is_here
from models import CHUNK, build, difference, prompt, run
from naming import given
from pressed import asked, document, logits_of, report_of, sharp

LENGTHS = (40, 53, 21)
IDS = [prompt(length, seed=length) for length in LENGTHS]
STARTS = (0, 40, 93, 114)
ALL = torch.cat(IDS, dim=1)
EVERYTHING: list[Blend] = [CacheBlend(1), EPIC(1000)]


def alone(model: Any, ids: list[torch.Tensor] = IDS) -> list[Any]:
    return [document(model, one) for one in ids]


def blended(method: Blend, model: Any = None, measure: bool = True) -> PressedCache:
    model = model or sharp()
    return method(model, alone(model), IDS, measure=measure)


def recomputed(small: PressedCache) -> int:
    report = report_of(small)
    assert isinstance(report, BlendReport)
    return report.recomputed


def continued(model: Any) -> DynamicCache:
    """The reference: the first document, and the others run on it, each in one forward."""
    kept = document(model, IDS[0])
    for end in STARTS[2:]:
        logits_of(model, kept, ALL[:, :end])
    return kept


@pytest.mark.parametrize("method", EVERYTHING, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt_neox"])
def test_all_computed_again_is_the_full_prefill(family: str, attention: str, method: Blend) -> None:
    model = build(family, attention=attention)
    small = blended(method, model)
    assert recomputed(small) == ALL.shape[1] - LENGTHS[0]
    right = continued(model)
    for layer, other in zip(small.layers, right.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
    found = run(model, asked(ALL), small)
    assert difference(found, run(model, asked(ALL), right)) == ""
    assert torch.equal(found.tokens, run(model, asked(ALL), document(model, ALL)).tokens)


@pytest.mark.parametrize("method", [CacheBlend(), EPIC()], ids=str)
def test_one_document_stays_bit_for_bit_as_it_is(method: Blend) -> None:
    model = sharp()
    small = method(model, [document(model, IDS[1])], [IDS[1]])
    assert recomputed(small) == 0
    assert report_of(small).error == 0
    assert difference(run(model, asked(IDS[1]), small), run(model, asked(IDS[1]), document(model, IDS[1]))) == ""


@pytest.mark.parametrize("method", [CacheBlend(0), EPIC(0), CacheBlend(0.3), EPIC(4)], ids=str)
def test_keys_have_the_positions_of_the_whole_prompt(method: Blend) -> None:
    """The first layer's KV depends on token and position alone, so there it is that of the full prefill."""
    model = sharp()
    small, right = blended(method), document(model, ALL)
    assert torch.allclose(small.layers[0].keys, right.layers[0].keys, atol=1e-4)
    assert torch.allclose(small.layers[0].values, right.layers[0].values, atol=1e-5)
    assert small.get_seq_length() == ALL.shape[1]


def test_epic_computes_the_first_tokens_of_each_document_again() -> None:
    model = sharp()
    stored, small = blended(EPIC(0)), blended(EPIC(4))
    assert recomputed(stored) == 0
    assert recomputed(small) == 8
    again = {*range(40, 44), *range(93, 97)}
    assert changed(stored, small) == again
    assert recomputed(blended(EPIC(30))) == 30 + 21
    first = document(model, IDS[0])
    assert all(
        torch.equal(layer.keys[:, :, :40], right.keys) for layer, right in zip(small.layers, first.layers, strict=True)
    )


def changed(one: PressedCache, other: PressedCache, number: int = 2) -> set[int]:
    """Tokens whose KV differs in a layer."""
    differs = (one.layers[number].values - other.layers[number].values).abs().amax(dim=(0, 1, 3)) > 0
    return set(differs.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_cacheblend_computes_the_tokens_again_that_deviate_most(ratio: float) -> None:
    model = sharp()
    stored, right = alone(model), document(model, ALL)
    old = torch.cat([one.layers[1].values for one in stored], dim=2)
    deviation = (old - right.layers[1].values).square().sum(dim=(0, 1, 3))
    again: set[int] = set()
    for start, length in zip(STARTS[1:], LENGTHS[1:], strict=False):
        most = deviation[start : start + length].topk(int(length * ratio)).indices
        again |= {start + int(token) for token in most}
    small = blended(CacheBlend(ratio))
    assert recomputed(small) == len(again)
    assert changed(blended(CacheBlend(0)), small) == again
    assert torch.allclose(small.layers[1].keys, right.layers[1].keys, atol=1e-3)


@pytest.mark.parametrize("method", [EPIC(3), CacheBlend(0.25)], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tokens_computed_again_see_all_before_them(method: Blend, attention: str) -> None:
    """The reference computes them one by one, each on what comes before it, its own KV put in its place."""
    model = sharp(attention=attention)
    small = blended(method, model)
    base = method.__class__(0)(model, alone(model), IDS)
    keys = [layer.keys.clone() for layer in base.layers]
    values = [layer.values.clone() for layer in base.layers]
    for place in sorted(changed(base, small)):
        cache = DynamicCache(config=model.config)
        for number in range(3):
            cache.update(keys[number][:, :, :place].clone(), values[number][:, :, :place].clone(), number)
        logits_of(model, cache, ALL[:, : place + 1])
        for number, layer in enumerate(cache.layers):
            keys[number][:, :, place], values[number][:, :, place] = layer.keys[:, :, -1], layer.values[:, :, -1]
    for number, layer in enumerate(small.layers):
        assert torch.allclose(layer.keys, keys[number], atol=1e-3)
        assert torch.allclose(layer.values, values[number], atol=1e-3)


def test_error_falls_with_the_share() -> None:
    errors = [report_of(blended(CacheBlend(ratio))).error or 0 for ratio in (0, 0.3, 0.7, 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 < errors[0]
    report = report_of(blended(CacheBlend(), measure=False))
    assert report.error is None
    assert report.bytes_after == report.bytes_before == 3 * 2 * 2 * ALL.shape[1] * 16 * 4
    assert (report.tokens, report.entries) == (ALL.shape[1], [ALL.shape[1]] * 3)


@pytest.mark.parametrize("method", [CacheBlend(0.2), EPIC(8), *EVERYTHING], ids=str)
def test_documents_come_from_a_store_in_any_order(method: Blend) -> None:
    model, store = build("llama"), MemoryStore()
    for ids in IDS:
        with CakeCache(model, store, chunk_size=CHUNK) as cache:
            cache.prefill(ids)
            assert cache.flush(60)
    keys = set(store.keys())
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):
        caches = [CakeCache(model, store, chunk_size=CHUNK, strategy="load") for _ in order]
        for cache, number in zip(caches, order, strict=True):
            assert cache.prefill(IDS[number]).chunks_computed == 0
        before = [[layer.keys.clone() for layer in cache.layers] for cache in caches]
        small = method(model, caches)
        ids = torch.cat([IDS[number] for number in order], dim=1)
        assert torch.allclose(small.layers[0].keys, document(model, ids).layers[0].keys, atol=1e-4)
        run(model, asked(ids), small)
        for cache, states in zip(caches, before, strict=True):
            assert all(torch.equal(layer.keys, state) for layer, state in zip(cache.layers, states, strict=True))
            assert cache.flush(60)
            cache.close()
    assert set(store.keys()) == keys


class Forwards:
    """Counts the forwards of a model in the thread that made this, and wakes who waits for one.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        self.seen, self._count, self._thread = threading.Condition(), 0, threading.get_ident()
        self.hook = model.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        if threading.get_ident() == self._thread:
            with self.seen:
                self._count += 1
                self.seen.notify_all()

    def wait_for(self, count: int) -> bool:
        """Waits until there were so many."""
        with self.seen:
            return self.seen.wait_for(lambda: self._count >= count, 60)


@pytest.mark.parametrize("method", [CacheBlend(0.3), EPIC(4)], ids=str)
def test_a_document_loads_while_tokens_of_the_one_before_are_computed_again(method: Blend) -> None:
    model = build("llama")
    right = method(model, alone(model), IDS, measure=False)
    forwards, waited = Forwards(model), []

    def documents() -> Iterator[Any]:
        for number, one in enumerate(alone(model)):
            # The third document comes only after the second one's tokens were computed again.
            waited.append(number < 2 or forwards.wait_for(1))
            yield one

    small = method(model, documents(), IDS, measure=False)
    forwards.hook.remove()
    assert waited == [True] * 3
    for layer, other in zip(small.layers, right.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


def test_documents_are_restored_while_others_are_computed_again() -> None:
    model, store = build("llama"), MemoryStore()
    right = EPIC(8)(model, stored_alone(model, store), measure=False)
    restored = stored_alone(model, store, strategy="load")
    small = EPIC(8)(model, restored, measure=False)
    for layer, other in zip(small.layers, right.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


def stored_alone(model: Any, store: MemoryStore, **options: Any) -> Iterator[CakeCache]:
    """Caches of the documents, each filled when it is taken; all that is stored has to be loaded with `strategy="load"`."""
    for ids in IDS:
        cache = CakeCache(model, store, chunk_size=CHUNK, **options)
        report = cache.prefill(ids)
        assert cache.flush(60)
        assert not options or report.chunks_computed == 0
        yield cache


def test_what_a_document_fails_with_reaches_the_caller() -> None:
    def documents() -> Iterator[Any]:
        yield document(sharp(), IDS[0])
        raise OSError("no such document")

    with pytest.raises(OSError, match="no such document"):
        EPIC()(sharp(), documents(), IDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_document_may_be_as_short_as_one_token(dtype: str) -> None:
    model = build("llama", dtype)
    ids = [prompt(length, seed=length) for length in (1, 2, 30, 1)]
    for method in (CacheBlend(0.5), EPIC(1), CacheBlend(1)):
        small = method(model, [document(model, one) for one in ids], ids)
        assert run(model, asked(torch.cat(ids, dim=1)), small).tokens.shape[1] == 34 + 9 + 4


def test_a_model_of_one_layer() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    small = CacheBlend(0.2)(model, alone(model), IDS)
    assert torch.allclose(small.layers[0].keys, document(model, ALL).layers[0].keys, atol=1e-4)


def of_another_rotation(name: str) -> Any:
    """Models whose rotary embedding turns neighbouring channels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, num_key_value_heads=2, vocab_size=128, pad_token_id=0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_positions_are_turned_too_unless_the_length_changes_them(kind: str) -> None:
    torch.manual_seed(0)
    rope = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=128, max_position_embeddings=64, rope_parameters=rope, **sizes)
    model = LlamaForCausalLM(config).eval()
    documents = alone(model)
    if kind == "dynamic":
        with pytest.raises(CakeError, match="does not follow"):
            CacheBlend(0.2)(model, documents, IDS)
        return
    small = CacheBlend(0.2)(model, documents, IDS)
    assert torch.allclose(small.layers[0].keys, document(model, ALL).layers[0].keys, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "deepseek_v3", "qwen3_next", "Cohere", "Glm"])
@pytest.mark.parametrize("method", [CacheBlend(), EPIC(), CacheBlend(1)], ids=str)
def test_other_models_are_refused_in_one_sentence(family: str, method: Blend) -> None:
    """No rotary positions, pairs turned in another order, windows, latents, states: no wrong answer."""
    if family.islower() and not is_here(family):
        pytest.skip("this transformers has no such family, or a cache of its own for it")
    model = family_model(family) if family.islower() else of_another_rotation(family)
    with pytest.raises(CakeError, match=r"made for|rotary|does not go through") as raised:
        method(model, alone(model), IDS)
    assert str(raised.value).count(". ") == 0


@pytest.mark.parametrize("place", [0, 10, 20])
def test_one_wrong_id_among_many_is_noticed(place: int) -> None:
    model, ids = sharp(), [prompt(3000, seed=1), prompt(21, seed=2)]
    documents = alone(model, ids)
    ids[1] = ids[1].clone()
    ids[1][0, place] = (ids[1][0, place] + 1) % 128
    for method in (CacheBlend(), EPIC()):
        with pytest.raises(CakeError, match="in its first layer"):
            method(model, documents, ids)


def test_calls_that_make_no_sense_say_so() -> None:
    model = sharp()
    with pytest.raises(CakeError, match="at least one document"):
        CacheBlend()(model, [])
    with pytest.raises(CakeError, match="pass the token ids of all documents"):
        EPIC()(model, alone(model))
    with pytest.raises(CakeError, match="in its first layer"):
        EPIC()(model, alone(model), [prompt(length, seed=99) for length in LENGTHS])
    for documents, ids in ((alone(model), IDS[:2]), (alone(model)[:2], IDS)):
        with pytest.raises(CakeError, match="Each document has its token ids"):
            EPIC()(model, documents, ids)
    with pytest.raises(ValueError, match="between 0 and 1"):
        CacheBlend(1.5)
    with pytest.raises(ValueError, match="not negative"):
        EPIC(-1)


def test_an_interrupted_look_leaves_no_trace() -> None:
    """The forward that computes only the first layers ends early; the next one is as always."""
    model = build("llama")
    right = run(model, ALL, DynamicCache(config=model.config))
    blended(CacheBlend(0.2), model)
    with torch.no_grad():
        model(prompt(5), **given(DynamicCache(config=model.config)))
    assert difference(run(model, ALL, DynamicCache(config=model.config)), right) == ""
