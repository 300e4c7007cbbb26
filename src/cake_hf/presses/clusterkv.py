"""ClusterKV: Manipulating LLM KV Cache in Semantic Space for Recallable Compression (Liu et al., arXiv 2412.03213)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from cake_hf.presses.attention import Attended, AttentionCall, attended, grouped
from cake_hf.presses.layers import PressedLayer, causal_mask
from cake_hf.presses.press import Prefix, Press, check_share


@dataclass(frozen=True)
class ClusterKV(Press):
    """Keeps all KV in clusters of similar keys; each query attends to the clusters that suit it best, up to a budget.

    Keys of a head are clustered by k-means with the distance `1 - cos(k_i, k_j)`; a centroid is the mean of its keys (section
    3.2 of the paper). A query ranks the clusters by `q . centroid` and takes their tokens in this order until the budget is
    full; of the last cluster it takes a part (section 3.3). The first tokens (sinks) and those since the last clustering are
    always used. What the model decodes is clustered, too, `every` tokens at a time.
    Memory: nothing less, and the centroids on top, since any token can be recalled; `report.entries` is what a query reads.
    Keys are not moved to another device.

    Args:
        ratio: share of the prefix that a query does not use. With 0 the output is bit for bit that of the full cache.
        sinks: first tokens, which are not clustered.
        size: tokens per cluster, on average.
        every: decoded tokens that are clustered together.
        iterations: the most iterations of k-means.
        dense: first layers that keep and use everything, as in the paper's code.
    """

    ratio: float = 0.5
    sinks: int = 16
    size: int = 80
    every: int = 320
    iterations: int = 10
    dense: int = 2

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)

    def layer(self, prefix: Prefix, number: int) -> PressedLayer:
        if not self.ratio or number < self.dense or prefix.tokens <= self.sinks:
            return prefix.plain_layer(number)
        return ClusteredLayer(prefix.keys[number], prefix.values[number], self)


class ClusteredLayer(PressedLayer):
    """Keeps all keys and values: first the sinks, then those in clusters, then those that came since.

    Attributes:
        budget: entries that a query uses of sinks and clusters together.
        centroids: `[heads, clusters, head_dim]`, float32.
        cluster: `[heads, clustered tokens]`, the number of each token's cluster.
        place: `[heads, clustered tokens]`, how many tokens of its cluster come before it.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, method: ClusterKV) -> None:
        super().__init__(keys, values, keys.shape[-2])
        self.method = method
        self.budget = int(self.seen * (1 - method.ratio))
        heads, head_dim = keys.shape[1], keys.shape[-1]
        self.centroids = torch.zeros((heads, 0, head_dim), device=keys.device)
        self.cluster = self.place = torch.zeros((heads, 0), dtype=torch.int32, device=keys.device)
        self._cluster_the_rest()

    @property
    def clustered(self) -> int:
        """Tokens in clusters."""
        return int(self.cluster.shape[-1])

    @property
    def recalled(self) -> int:
        """Tokens of clusters that a query uses."""
        return min(self.clustered, max(0, self.budget - self.method.sinks))

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.keys.shape[-2] - self.method.sinks - self.clustered >= self.method.every:
            self._cluster_the_rest()
        super().append(key_states, value_states)

    def _cluster_the_rest(self) -> None:
        rest = self.keys[0, :, self.method.sinks + self.clustered :].float()
        centroids, cluster = clusters(rest, max(1, rest.shape[-2] // self.method.size), self.method.iterations)
        self.cluster = torch.cat([self.cluster, cluster.int() + self.centroids.shape[1]], dim=-1)
        self.place = torch.cat([self.place, _places(cluster, centroids.shape[1]).int()], dim=-1)
        self.centroids = torch.cat([self.centroids, centroids], dim=1)

    def wanted(self, query: torch.Tensor) -> torch.Tensor:
        """Returns which of the clustered tokens each query uses: `[heads, group, new, clustered]`, `recalled` in each row."""
        cluster = self.cluster.long()
        sizes = _sizes(cluster, self.centroids.shape[1])
        order = (query[0].float() @ self.centroids[:, None].transpose(-1, -2)).argsort(dim=-1, descending=True)
        ordered = sizes[:, None, None].expand(order.shape).gather(-1, order)
        before = torch.empty_like(order).scatter_(-1, order, ordered.cumsum(dim=-1) - ordered)
        number = before.gather(-1, cluster[:, None, None].expand(*order.shape[:-1], -1)) + self.place[:, None, None]
        return number < self.recalled

    def attend(self, call: AttentionCall) -> Attended:
        """Computes attention: of one new token on what it recalls alone, of several with a mask that hides the rest."""
        attention, query, keys, values, _ = call
        attention.require_plain("ClusterKV")
        wanted = self.wanted(grouped(query, keys.shape[1]))
        start, end, total = self.method.sinks, self.method.sinks + self.clustered, keys.shape[-2]
        hidden = causal_mask(query, total)
        if hidden is not None:
            hidden = hidden.repeat(1, query.shape[1], 1, 1)
            hidden[0, :, :, start:end].masked_fill_(~wanted.flatten(0, 1), torch.finfo(query.dtype).min)
            return attention(query, keys, values, hidden)
        recalled = wanted.nonzero()[:, -1].view(*wanted.shape[:2], self.recalled) + start
        always = torch.cat([torch.arange(start), torch.arange(end, total)]).to(keys.device)
        entries = torch.cat([always.expand(*wanted.shape[:2], -1), recalled], dim=-1)[None, ..., None]
        query = grouped(query, keys.shape[1])
        keys, values = (
            states[:, :, None]
            .expand(-1, -1, query.shape[2], -1, -1)
            .gather(3, entries.expand(*entries.shape[:-1], width))
            for states, width in ((keys, keys.shape[-1]), (values, values.shape[-1]))
        )
        return attended(query, keys, values, attention.scaling, None)[0], None

    def state(self) -> list[torch.Tensor]:
        return [*super().state(), self.centroids, self.cluster, self.place]

    @property
    def entries(self) -> float:
        return float(self.keys.shape[-2] - self.clustered + self.recalled)


def clusters(keys: torch.Tensor, count: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters keys by cosine distance; the first centroids are keys at even distances, so the result is always the same.

    Args:
        keys: `[heads, tokens, head_dim]`, float32.
        count: of clusters, not more than tokens.
        iterations: at most.

    Returns:
        The centroids `[heads, count, head_dim]`, each the mean of its keys, and the cluster of each key `[heads, tokens]`.
    """
    centroids = keys[:, torch.linspace(0, keys.shape[1] - 1, count).long().to(keys.device)]
    nearest = torch.empty(0)
    for _ in range(max(1, iterations)):
        before, nearest = nearest, (normalize(keys, dim=-1) @ normalize(centroids, dim=-1).transpose(1, 2)).argmax(-1)
        if torch.equal(before, nearest):
            break
        sums = torch.zeros_like(centroids).scatter_add_(1, nearest[..., None].expand_as(keys), keys)
        sizes = _sizes(nearest, count)[..., None]
        centroids = torch.where(sizes > 0, sums / sizes.clamp_min(1), centroids)
    return centroids, nearest


def _sizes(cluster: torch.Tensor, count: int) -> torch.Tensor:
    """Returns how many tokens each cluster has, `[heads, count]`."""
    sizes = torch.zeros((cluster.shape[0], count), dtype=torch.long, device=cluster.device)
    return sizes.scatter_add_(1, cluster, torch.ones_like(cluster))


def _places(cluster: torch.Tensor, count: int) -> torch.Tensor:
    """Returns for each token how many tokens of its cluster come before it."""
    order = cluster.argsort(dim=-1, stable=True)
    sizes = _sizes(cluster, count)
    start = (sizes.cumsum(dim=-1) - sizes).gather(-1, cluster.gather(-1, order))
    place = torch.arange(order.shape[-1], device=order.device) - start
    return torch.empty_like(order).scatter_(-1, order, place)
