"""ClusterKV: a query uses the clusters that it ranks first, up to its budget; everything can be recalled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from cake_hf import CakeError
from cake_hf.presses import ClusterKV
from cake_hf.presses.clusterkv import ClusteredLayer, clusters
from families import family_model, is_here
from models import prompt, run, shared_model
from pressed import QUESTION, asked, document, logits_of, one_by_one, report_of, sharp

IDS = prompt()
TOKENS = IDS.shape[1]
SINKS = 4


def method(ratio: float = 0.5, **options: Any) -> ClusterKV:
    return ClusterKV(ratio, **{"sinks": SINKS, "size": 8, "dense": 0, **options})


def layers_of(small: Any) -> list[ClusteredLayer]:
    assert all(isinstance(layer, ClusteredLayer) for layer in small.layers)
    return list(small.layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_nothing_left_out_is_the_full_cache_bit_for_bit(family: str, attention: str) -> None:
    model = sharp(family, attention=attention)
    for question in (1, QUESTION):
        full, ids = document(model, IDS), asked(IDS, question)
        for press in (method(0), ClusterKV(0.9, dense=3), ClusterKV(0.9, sinks=TOKENS)):
            found = run(model, ids, press(model, full, IDS)).logits
            assert torch.equal(found, run(model, ids, copy.deepcopy(full)).logits)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9, 1.0])
def test_the_budget_is_held_by_each_query_of_each_head(ratio: float) -> None:
    model = sharp()
    small = method(ratio)(model, document(model, IDS), IDS)
    budget = int(TOKENS * (1 - ratio))
    for layer in layers_of(small):
        wanted = layer.wanted(torch.randn(1, 2, 2, QUESTION, 16))
        assert wanted.shape == (2, 2, QUESTION, TOKENS - SINKS)
        assert (wanted.sum(dim=-1) == max(0, budget - SINKS)).all()
    assert report_of(small).entries == [max(budget, SINKS)] * 3


def test_clusters_are_taken_in_the_order_of_their_centroids() -> None:
    """The reference: cluster by cluster, the last one in part."""
    model = sharp()
    layer = layers_of(method(0.6)(model, document(model, IDS), IDS))[1]
    query = torch.randn(1, 2, 2, 3, 16)
    wanted = layer.wanted(query)
    for head in range(2):
        for group in range(2):
            for new in range(3):
                order = (layer.centroids[head] @ query[0, head, group, new]).argsort(descending=True)
                tokens = [
                    token for number in order for token in (layer.cluster[head] == number).nonzero()[:, 0].tolist()
                ]
                assert set(wanted[head, group, new].nonzero()[:, 0].tolist()) == set(tokens[: layer.recalled])


def test_similar_keys_share_a_cluster_and_centroids_are_means() -> None:
    directions = torch.eye(4, 8)
    turn = torch.arange(40) % 4
    keys = directions[turn] * torch.linspace(1, 5, 40)[:, None] + torch.randn(40, 8) / 100
    centroids, cluster = clusters(keys[None], 4, 20)
    for direction in range(4):
        members = cluster[0, turn == direction]
        assert (members == members[0]).all()
        assert torch.allclose(centroids[0, members[0]], keys[turn == direction].mean(dim=0), atol=1e-5)
    assert len(set(cluster[0].tolist())) == 4


def test_one_token_and_several_recall_the_same() -> None:
    """Decoding gathers what it recalls; a question of several tokens masks the rest."""
    model, ids = sharp(), asked(IDS)
    small = method(0.7)(model, document(model, IDS), IDS)
    several = logits_of(model, copy.deepcopy(small), ids)
    assert torch.allclose(one_by_one(model, small, ids), several, atol=1e-4)
    assert not torch.allclose(logits_of(model, document(model, IDS), ids), several, atol=1e-2)


def test_what_is_left_out_by_one_query_comes_back_for_another() -> None:
    model = sharp()
    layer = layers_of(method(0.9)(model, document(model, IDS), IDS))[0]
    wanted = layer.wanted(torch.randn(1, 2, 2, 200, 16))
    assert wanted.any(dim=2).float().mean() > 0.9
    assert not wanted.all(dim=2).any()


def test_decoded_tokens_are_clustered_in_their_turn() -> None:
    model, ids = sharp(), asked(IDS, 40)
    small = method(0.5, every=16)(model, document(model, IDS), IDS)
    before = [layer.centroids.shape[1] for layer in layers_of(small)]
    one_by_one(model, small, ids)
    for layer, count in zip(layers_of(small), before, strict=True):
        assert layer.clustered == TOKENS - SINKS + 32
        assert layer.centroids.shape[1] == count + 4
        assert layer.recalled == TOKENS // 2 - SINKS
        assert layer.entries == TOKENS // 2 + 8
        assert layer.keys.shape[-2] == ids.shape[1]


def test_error_falls_with_the_budget_and_bytes_are_told() -> None:
    model, full = sharp(), document(sharp(), IDS)
    reports = [report_of(method(ratio)(model, full, IDS)) for ratio in (0, 0.3, 0.6, 0.9)]
    errors = [report.error for report in reports]
    assert errors[0] == 0
    assert errors == sorted(errors, key=lambda error: error or 0)
    assert all(report.bytes_after > report.bytes_before for report in reports[1:])  # the centroids


def test_clusters_beat_the_same_number_of_recent_tokens() -> None:
    """What the paper claims over fixed eviction, on attention that prefers some tokens."""
    model, full = sharp(), document(sharp(), IDS)
    recalled = report_of(method(0.7, sinks=0)(model, full, IDS))
    random = report_of(
        method(0.7, sinks=0, iterations=1, size=TOKENS)(model, full, IDS)
    )  # one cluster: the oldest tokens
    assert recalled.error is not None
    assert random.error is not None
    assert recalled.error < random.error


@pytest.mark.parametrize("family", ["gemma3", "deepseek_v3", "qwen3_next"])
def test_other_layers_are_refused_in_one_sentence(family: str) -> None:
    if not is_here(family):
        pytest.skip("this transformers has no such family, or a cache of its own for it")
    model = family_model(family)
    with pytest.raises(CakeError, match=r"^ClusterKV[^.]*\.\d[^.]* is made for") as raised:
        ClusterKV()(model, document(model, prompt(60)), prompt(60))
    assert str(raised.value).count(". ") == 0


def test_a_share_is_a_share() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ClusterKV(2)


def test_the_document_may_be_as_short_as_one_token() -> None:
    model = shared_model("llama")
    for tokens in (1, SINKS, SINKS + 1, SINKS + 9):
        ids = prompt(tokens)
        small = method(0.5)(model, document(model, ids), ids)
        assert run(model, asked(ids), small).tokens.shape[1] == tokens + QUESTION + 4
