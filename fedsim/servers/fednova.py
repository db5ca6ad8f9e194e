"""FedAvg in which a client counts by its direction, and not also by how many steps it took along it.

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
    """A delta is divided by its client's own effective steps, and the mean multiplied with the mean of these.

    Differs: the paper weighs a client by its rows, here `weighting: rows`; uniform is the default, as of all rules.
    Differs: the paper has no Adam; its effective steps are here its steps, as of plain sgd.
    """

    def adapt(self, method):
        if method.optimizer == "sgd" and method.momentum and method.persist_optimizer:
            raise InputError(
                "fednova counts steps of a momentum that starts from zero in every round; "
                "set --method.persist-optimizer false"
            )
        return method

    def reply(self, update):
        momentum = update.method.momentum if update.method.optimizer == "sgd" else 0.0
        reply = super().reply(update)
        # A client without a step has no direction, and is left out.
        return replace(reply, weight=reply.weight / effective(update.steps, momentum) if update.steps else 0.0)

    def step(self, params, slots, total, rng):
        stats = total.clients[total.clients["steps"] > 0]
        if not len(stats):
            return params, slots
        weights = stats["rows"].astype(float) if self.weighting == "rows" else np.ones(len(stats))
        steps = weights @ (weights / stats["weight"]) / weights.sum()  # the mean of the effective steps
        return apply_update(params, unflatten(steps / weights.sum() * total.delta, params)), slots


def effective(steps: int, momentum: float) -> float:
    """How often a gradient that is the same at each of these steps would be in their sum."""
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
