"""Coordinate-wise median of the clients' deltas, robust to a minority of Byzantine clients.

Source: Yin et al. 2018, arXiv 1803.01498, of which no authors' code was found: not checked against code.
"""

import numpy as np

from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.servers import Server
from fedsim.updates import apply_update, blocks, stepped


@component
class Median(Server):
    """With an even number of clients, it is the mean of the two middle values."""

    needs_deltas = True

    def step(self, params, slots, total, rng):
        if not len(stepped(total)):
            return params, slots
        median = np.empty(total.require_deltas().shape[1])
        for block, deltas in blocks(total):
            median[block] = np.median(deltas, axis=0)
        return apply_update(params, unflatten(median, params)), slots
