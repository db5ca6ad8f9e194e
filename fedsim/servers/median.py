"""The median of the clients' deltas, parameter by parameter: what few of them send cannot move it far.

Source: Yin et al. 2018, arXiv 1803.01498, of which no authors' code was found: not checked against code.
"""

import numpy as np

from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.servers import Server
from fedsim.updates import apply_update, blocks, stepped


@component
class Median(Server):
    """Of an even number of clients, the mean of the two in the middle."""

    sees_each = True

    def step(self, params, slots, total, rng):
        if not len(stepped(total)):
            return params, slots
        middle = np.empty(total.each.shape[1])
        for place, each in blocks(total):
            middle[place] = np.median(each, axis=0)
        return apply_update(params, unflatten(middle, params)), slots
