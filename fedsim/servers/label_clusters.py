"""Means within clusters of clients, by the likeness of their labels and by how these complement each other (CAPT).

Source: the server of method `capt`, Hou et al., CVPR 2025, arXiv 2503.06993; as in a copy of the authors' code,
2373604131/clientLT, commit 24045d2, federated_main.py.
Unread: the paper, beyond its abstract.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from fedsim.methods.capt import CAPT
from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear
from fedsim.servers import Averaging
from fedsim.servers._deltas import weighted_mean, weighted_sum
from fedsim.servers._needs import required
from fedsim.updates import apply_update, stepped


@component
class LabelClusters(Averaging):
    """For method `capt`. Clients send how many train rows they have of each class.

    The tokens of classes are first averaged within clusters of clients with similar shares of the classes: k-means of
    the rows of the matrix of Jensen-Shannon divergences. The general tokens are averaged within clusters of clients
    whose shares have little in common: complete linkage of distances that fall as 1 - p q grows, for shares p and q.
    Then the tokens of a class become the mean over the clients that have more than `threshold` of their rows of it; if
    there is none, they stay. All else is the mean by rows.

    A class that never has such a client keeps its first tokens; with many classes, these are most.

    Differs: here every round ends so. In the code, that is every f-th round only, and a bandit draws f from six values,
    rewarded by accuracy on the test rows; until then, all clients continue to train one model, in turn.
    Differs: k-means starts from the client nearest to the mean of all, and then from the client farthest from the
    centres so far, so that it draws nothing; the code draws ten starts. Only clients that took a step are in clusters.
    """

    needs_deltas = True

    weighting: Literal["uniform", "rows"] = "rows"
    similar: int = Field(4, ge=1, le=1024, search=Linear(1, 8), description="clusters of clients with similar shares")
    complementary: int = Field(
        4, ge=1, le=1024, search=Linear(1, 8), description="clusters of clients whose shares have little in common"
    )
    threshold: float = Field(
        0.1,
        ge=0,
        lt=1,
        search=Choice((0.0, 0.05, 0.1, 0.2)),
        description="share of a client's rows above which it counts for a class",
    )

    def adapt(self, method):
        return required(self, method, CAPT, "prompts of method capt")

    def init(self, params):
        return {"seen": {"rows": torch.zeros(len(params["class_aware"]))}}, {}

    def broadcast(self, slots, params):
        return {"class_rows": slots["seen"]["rows"]}

    def reply(self, update):
        # Without a client, the message is only counted.
        none = torch.zeros(len(update.received["class_aware"]), dtype=torch.int64)
        counts = update.client.counts if update.client else none
        return replace(super().reply(update), message={"counts": counts})

    def step(self, params, slots, total, rng):
        active, weights = stepped(total), total.clients["weight"]
        step = weighted_mean(total, weights, params)
        assert total.messages is not None, "needs_deltas"
        if not len(active):
            return apply_update(params, step), slots
        counts = total.messages[active]
        shares = counts / counts.sum(axis=1, keepdims=True)
        # A client's delta becomes the mean over its cluster: those of a round have all received the same.
        same = together(similar_clusters(shares, self.similar))
        mixed = together(complementary_clusters(shares, self.complementary))
        # Not `@`, whose last bits depend on the threads of BLAS.
        factors = np.einsum("i,ij->j", weights[active] / weights[active].sum(), mixed)
        step["general"] = unflatten(weighted_sum(total, factors), params)["general"]
        chosen = (shares > self.threshold).astype(np.float64)
        chosen /= np.maximum(1, chosen.sum(axis=0))
        step["class_aware"].zero_()
        for delta, factors in zip(total.require_deltas()[active], np.einsum("ic,ij->jc", chosen, same), strict=True):
            own = torch.from_numpy(factors)[:, None, None]
            step["class_aware"] += own * unflatten(delta, params)["class_aware"].double()
        rows = slots["seen"]["rows"].double() + torch.from_numpy(total.messages.sum(axis=0))
        return apply_update(params, step), {"seen": {"rows": rows.to(slots["seen"]["rows"].dtype)}}


def together(clusters: np.ndarray) -> np.ndarray:
    """(n,) clusters of clients -> (n, n) weights of the clients in the mean over each client's cluster."""
    same = clusters[:, None] == clusters
    return same / same.sum(axis=1, keepdims=True)


def similar_clusters(shares: np.ndarray, count: int, iterations: int = 100) -> np.ndarray:
    """(n, C) shares of classes -> (n,) clusters, at most `count`."""
    points = divergences(shares)
    chosen = [int(((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin())]
    while len(chosen) < min(count, len(points)):
        distances = ((points[:, None] - points[chosen]) ** 2).sum(axis=2).min(axis=1)
        if not distances.max():  # no further client differs from those that are chosen
            break
        chosen.append(int(distances.argmax()))
    centres, clusters = points[chosen], np.full(len(points), -1)
    for _ in range(iterations):
        before, clusters = clusters, ((points[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        if np.array_equal(before, clusters):
            break
        members = [points[clusters == k] for k in range(len(centres))]
        centres = np.stack([own.mean(axis=0) if len(own) else old for own, old in zip(members, centres, strict=True)])
    return clusters


def divergences(shares: np.ndarray) -> np.ndarray:
    """(n, C) shares of classes -> (n, n) Jensen-Shannon divergences, in nats."""
    middle = (shares[:, None] + shares) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares[:, None] > 0, shares[:, None] * np.log(shares[:, None] / middle), 0.0).sum(axis=2)
    return (terms + terms.T) / 2


def complementary_clusters(shares: np.ndarray, count: int) -> np.ndarray:
    """(n, C) shares of classes -> (n,) clusters, exactly `count` if there are as many clients."""
    apart = 1 - np.einsum("ic,jc->ij", shares, shares)
    np.fill_diagonal(apart, 0)
    distances = 1 - apart / max(apart.max(), 1e-300)
    np.fill_diagonal(distances, np.inf)
    clusters, left = np.arange(len(shares)), len(shares)
    while left > count:
        first, second = sorted(np.unravel_index(distances.argmin(), distances.shape))
        distances[first] = distances[:, first] = np.maximum(distances[first], distances[second])
        distances[first, first] = np.inf
        distances[second] = distances[:, second] = np.inf
        clusters[clusters == second] = first
        left -= 1
    return clusters
