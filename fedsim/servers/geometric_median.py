"""Geometric median of the clients' deltas, robust to less than half of the weight (RFA).

Source: Pillutla, Kakade and Harchaoui 2019, arXiv 1912.13445; the iteration, its nu and the number of iterations are
those of the authors' code, krishnap25/RFA, commit 8435c86, models/model.py.

Differs: the code starts from the weighted mean, which one client can move so far that a few iterations do not lead
back. Here they start from zero, the received parameters, as in epfml/byzantine-robust-optimizer, commit c6a0092,
codes/aggregator/rfa.py. The code stops early once its objective hardly falls; here the number of iterations is fixed.
It weights clients by their rows (`weighting: rows`); the default is uniform, as in `fedavg`.

Unread: the paper.
"""

import numpy as np

from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Choice, Field
from fedsim.servers import Averaging
from fedsim.servers._deltas import distances, weighted_sum
from fedsim.updates import apply_update, stepped


@component
class GeometricMedian(Averaging):
    """Smoothed Weiszfeld iterations: means in which a client weighs the less, the further it is from the last one.

    If clients with a share b < 1/2 of the weight are Byzantine, and the deltas of the others are no longer than r, the
    result is no longer than 2 r (1 - b) / (1 - 2 b), for any number of iterations and any r far above nu.
    """

    needs_deltas = True

    iterations: int = Field(4, ge=1, le=1000, search=Choice((1, 4, 16)), description="iterations per round")
    nu: float = Field(
        1e-5, gt=0, description="clients nearer than this weigh alike; if all are, the result is the mean"
    )

    def step(self, params, slots, total, rng):
        clients = stepped(total)
        if not len(clients):
            return params, slots
        median = np.zeros(total.require_deltas().shape[1])
        for _ in range(self.iterations):
            weights = total.clients["weight"][clients] / np.maximum(distances(total, median), self.nu)
            median = weighted_sum(total, weights / weights.sum())
        return apply_update(params, unflatten(median, params)), slots
