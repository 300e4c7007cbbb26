"""KVSharer: layers that use the KV of an earlier one, found on calibration text, and kept once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cake_hf import CakeError
from cake_hf.presses import KVSharer
from families import family_model, is_here
from models import prompt, run
from pressed import QUESTION, asked, document, logits_of, one_by_one, report_of, sharp

IDS = prompt()
TEXTS = [prompt(40, seed=7), prompt(30, seed=8)]


class Sharing(DynamicCache):  # type: ignore[misc]  # transformers is not typed for us
    """The reference: a cache that gives a layer the KV of another."""

    source: dict[int, int]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **options: Any) -> Any:
        own = super().update(key, value, layer_idx, *args, **options)
        if layer_idx not in self.source:
            return own
        layer = self.layers[self.source[layer_idx]]
        return layer.keys, layer.values


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_nothing_shared_is_the_full_cache_bit_for_bit(family: str, attention: str) -> None:
    model = sharp(family, attention=attention)
    full, ids = document(model, IDS), asked(IDS)
    found = run(model, ids, KVSharer()(model, full, IDS)).logits
    assert torch.equal(found, run(model, ids, copy.deepcopy(full)).logits)


@pytest.mark.parametrize("shared", [((1, 0),), ((2, 0),), ((2, 1),), ((1, 0), (2, 0))], ids=str)
@pytest.mark.parametrize("question", [1, QUESTION])
def test_a_layer_uses_the_kv_of_another_bit_for_bit(shared: tuple[tuple[int, int], ...], question: int) -> None:
    model, ids = sharp(), asked(IDS, question)
    reference = Sharing(config=model.config)
    reference.source = {}
    for number, layer in enumerate(document(model, IDS).layers):
        reference.update(layer.keys, layer.values, number)
    reference.source = dict(shared)
    small = KVSharer(shared)(model, document(model, IDS), IDS)
    right = run(model, ids, reference).logits
    assert torch.equal(run(model, ids, copy.deepcopy(small)).logits, right)
    assert torch.allclose(one_by_one(model, small, ids)[0, -1], right[0], atol=1e-5)


@pytest.mark.parametrize("shared", [((2, 0),), ((1, 0), (2, 0))], ids=str)
def test_shared_kv_is_kept_once(shared: tuple[tuple[int, int], ...]) -> None:
    model, ids = sharp(), asked(IDS)
    small = KVSharer(shared)(model, document(model, IDS), IDS)
    left = 3 - len(shared)
    assert report_of(small).bytes_after * 3 == report_of(small).bytes_before * left
    copied = copy.deepcopy(small)
    for one in (small, copied):
        logits_of(model, one, ids)
        assert one.nbytes == left * 2 * 2 * ids.shape[1] * 16 * 4
        storages = {layer.keys.untyped_storage().data_ptr() for layer in one.layers}
        assert len(storages) == left
        assert all(layer.keys.shape[-2] == ids.shape[1] == layer.seen for layer in one.layers)


def test_calibration_takes_the_most_dissimilar_pair_first() -> None:
    model = sharp()
    kept = [document(model, text[:, :30]) for text in TEXTS]

    def flat(number: int) -> torch.Tensor:
        layers = [one.layers[number] for one in kept]
        return torch.stack([torch.cat([layer.keys.flatten(), layer.values.flatten()]) for layer in layers]).mean(dim=0)

    distances = {(one, other): (flat(one) - flat(other)).norm() for one in range(3) for other in range(one + 1, 3)}
    source, layer = max(distances, key=lambda pair: float(distances[pair]))
    assert KVSharer.calibrated(model, TEXTS, share=0.34, threshold=-1).shared == ((layer, source),)


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.4, 1), (0.7, 2), (1, 2)])
def test_calibration_shares_as_many_layers_as_wanted(share: float, count: int) -> None:
    """The first layer cannot share, since none is before it; and no layer uses the KV of one that keeps none."""
    found = KVSharer.calibrated(sharp(), TEXTS, share=share, threshold=-1).shared
    assert len(found) == count
    assert all(source < layer for layer, source in found)
    assert not {layer for layer, _ in found} & {source for _, source in found}


def test_calibration_shares_nothing_that_changes_the_model_too_much() -> None:
    assert KVSharer.calibrated(sharp(), TEXTS, share=1, threshold=1).shared == ()
    loose, strict = (len(KVSharer.calibrated(sharp(), TEXTS, 1, limit).shared) for limit in (-1, 0.999))
    assert strict <= loose == 2


def test_error_is_reported() -> None:
    model, full = sharp(), document(sharp(), IDS)
    errors = [report_of(KVSharer(shared)(model, full, IDS)).error for shared in ((), ((2, 1),), ((1, 0), (2, 0)))]
    assert errors[0] == 0
    assert all(error is not None and error > 0 for error in errors[1:])


@pytest.mark.parametrize("shared", [((0, 0),), ((0, 1),), ((1, -1),), ((2, 1), (1, 0)), ((2, 1), (2, 0))], ids=str)
def test_pairs_that_make_no_sense(shared: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="cannot share"):
        KVSharer(shared)


def test_pairs_of_another_model() -> None:
    with pytest.raises(CakeError, match="shares layer 7, and this model has 3"):
        KVSharer(((7, 1),))(sharp(), document(sharp(), IDS), IDS)


def test_calibration_needs_texts_and_a_share() -> None:
    with pytest.raises(ValueError, match="at least one calibration text"):
        KVSharer.calibrated(sharp(), [])
    with pytest.raises(ValueError, match="between 0 and 1"):
        KVSharer.calibrated(sharp(), TEXTS, share=2)


@pytest.mark.parametrize("family", ["gemma3", "deepseek_v3", "qwen3_next"])
def test_other_layers_are_refused_in_one_sentence(family: str) -> None:
    if not is_here(family):
        pytest.skip("this transformers has no such family, or a cache of its own for it")
    model = family_model(family)
    for call in (
        lambda: KVSharer()(model, document(model, prompt(60)), prompt(60)),
        lambda: KVSharer.calibrated(model, [prompt(60)]),
    ):
        with pytest.raises(CakeError, match=r"^KVSharer.* is made for") as raised:
            call()
        assert str(raised.value).count(". ") == 0
