"""FedAvg with deltas normalised by the number of local steps (FedNova).

Source: Wang et al. 2020, arXiv 2007.07481; effective steps as in the authors' code, JYWa/FedNova, commit 47b4e09,
distoptim/FedNova.py, whose program has no momentum by default and 0.9 in its launch script.
"""

from dataclasses import replace

import numpy as np

from fedsim.errors import InputError
from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.servers import Averaging
from fedsim.updates import apply_update


@component
class FedNova(Averaging):
    """Divides each delta by the client's effective steps and multiplies the mean by the mean of the effective steps.

    Differs: the paper weights clients by their rows, here `weighting: rows`; the mean is uniform by default.
    Differs: the paper does not cover Adam; here its effective steps are its steps, as for plain SGD.
    """

    averages = False

    def adapt(self, method):
        if method.optimizer == "sgd" and method.momentum and method.persist_optimizer:
            raise InputError(
                "fednova expects momentum that starts from zero in every round; set --method.persist-optimizer false"
            )
        return method

    def reply(self, update):
        momentum = update.method.momentum if update.method.optimizer == "sgd" else 0.0
        reply = super().reply(update)
        # A client without a step has no direction and is left out.
        return replace(reply, weight=reply.weight / effective(update.steps, momentum) if update.steps else 0.0)

    def step(self, params, slots, total, rng):
        stats = total.clients[total.clients["steps"] > 0]
        if not len(stats):
            return params, slots
        weights = stats["rows"].astype(float) if self.weighting == "rows" else np.ones(len(stats))
        steps = weights @ (weights / stats["weight"]) / weights.sum()  # the mean of the effective steps
        return apply_update(params, unflatten(steps / weights.sum() * total.delta, params)), slots


def effective(steps: int, momentum: float) -> float:
    """The sum of the coefficients of all gradients in the delta of this many SGD steps, in units of the step size."""
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
