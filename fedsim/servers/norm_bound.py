"""Mean of the clients' deltas, each clipped to a norm, so that no client moves the mean far.

Source: Sun, Kairouz, Suresh and McMahan 2019, arXiv 1911.07963: a delta is divided by max(1, its norm / bound). Its
norm is that of all shared tensors together. The default of 1 is ours: with their defaults, on ViT-B/32 features of
Caltech101 and Oxford Pets, deltas of `fedclip` have norms of about 0.3, and those of `probe` of 0.8.

Differs: the authors' code, google-parfait/tensorflow-federated, commit 0106781, aggregate_fn.py in
tensorflow_federated/python/research/targeted_attack, clips the mean of the deltas and not each of them. The Gaussian
noise that it can add to the mean is left out.

Unread: the paper, and so its bounds.
"""

import numpy as np

from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Averaging
from fedsim.servers._deltas import distances, weighted_sum
from fedsim.updates import apply_update, stepped


@component
class NormBound(Averaging):
    """With a bound above all norms this is `fedavg`.

    Whatever clients with a share b of the weight send, they add a vector to the step that is no longer than b * bound.
    """

    averages = False
    needs_deltas = True

    bound: float = Field(
        1.0, gt=0, search=Log(1e-2, 10.0), description="largest norm of a client's delta; longer ones are scaled to it"
    )

    def step(self, params, slots, total, rng):
        norms = distances(total, np.zeros(total.require_deltas().shape[1]))
        weights = total.clients["weight"][stepped(total)] * (self.bound / np.maximum(norms, self.bound))
        return apply_update(params, unflatten(weighted_sum(total, weights / total.weight), params)), slots
