"""Coordinate-wise trimmed mean of the clients' deltas, robust to a share of Byzantine clients.

Source: Yin et al. 2018, arXiv 1803.01498, of which no authors' code was found: not checked against code.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field, Linear
from fedsim.servers import Server
from fedsim.shares import part
from fedsim.updates import apply_update, blocks, stepped


@component
class TrimmedMean(Server):
    """With share 0 this is uniform FedAvg. The default share of 0.1 is ours."""

    needs_deltas = True

    share: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        search=Linear(0.1, 0.45),
        description="fraction of the cohort cut at each end, rounded down; the paper cuts as many as may be faulty",
    )

    def cut(self, clients: int) -> int:
        """Clients that are cut at each end."""
        return part(clients, self.share)

    def check(self, params, cohort):
        if self.share and not self.cut(cohort):
            raise InputError(
                f"trimmed_mean with share {self.share:g} cuts none of {cohort} clients, which is fedavg; "
                f"set --server.share to {1 / cohort:.3g} or more, or to 0"
            )

    def step(self, params, slots, total, rng):
        clients, width = len(stepped(total)), total.require_deltas().shape[1]
        if not clients:
            return params, slots
        cut, mean = self.cut(clients), np.empty(width)
        for block, deltas in blocks(total):
            mean[block] = np.sort(deltas, axis=0)[cut : clients - cut].mean(axis=0)
        return apply_update(params, unflatten(mean, params)), slots
