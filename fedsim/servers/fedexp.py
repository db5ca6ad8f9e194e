"""FedAvg with a server step size that grows as the clients' deltas disagree (FedExP).

Source: Jhunjhunwala, Wang and Joshi 2023, arXiv 2301.09604, with partial participation: the sums are over the cohort.
eps, and the mean of two models, as in the authors' code, Divyansh03/FedExP, commit 56dfaf9, main.py.

Differs: the code multiplies eps by the size of the cohort, and by a factor of 0.998 ** 2 per round. It weights clients
by their rows (`weighting: rows`); the mean is uniform by default, as in `fedavg`.
"""

from dataclasses import replace

import numpy as np
import torch

from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Averaging
from fedsim.updates import apply_update


@component
class FedExP(Averaging):
    """Multiplies the mean delta by max(1, S / (2 (|mean delta|^2 + eps))), where S is the mean of |delta|^2.

    Equal deltas give a factor of 1, which is `fedavg`; M orthogonal ones of equal length, M / 2. A client also sends
    the squared norm of its delta, one number. Because long steps oscillate, the mean of the last two models is
    evaluated, as in the paper; clients are sent the last one.

    eps is that of the code for CIFAR-10, CIFAR-100 and CINIC-10; for EMNIST it is 0.1. An eps far above |mean delta|^2
    makes the rule `fedavg`, so eps has to fit the method and its step size.
    """

    averages = False
    computes_messages = True

    eps: float = Field(
        1e-3,
        gt=0,
        search=Log(1e-8, 10.0),
        description="added to the squared norm of the mean delta, so that small deltas do not take long steps",
    )

    @property
    def evaluated_as(self):
        return "mean of the last two models"

    def init(self, params):
        return {"before": dict(params)}, {}

    def reply(self, update):
        squares = [(update.trained[name].double() - tensor).square().sum() for name, tensor in update.received.items()]
        message = {"square": torch.stack(squares).sum()} if squares else {}
        return replace(super().reply(update), message=message)

    def step(self, params, slots, total, rng):
        delta = total.delta / total.weight
        before = {"before": {name: params[name] for name in slots["before"]}}
        if not len(delta):
            return params, before
        # numpy, because the rounding of torch's sum depends on the number of threads.
        factor = max(1.0, total.message[0] / total.weight / (2 * (np.square(delta).sum() + self.eps)))
        return apply_update(params, unflatten(factor * delta, params)), before

    def evaluated(self, params, slots):
        return {name: (tensor + slots["before"][name]) / 2 for name, tensor in params.items()}
