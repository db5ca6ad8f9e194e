"""Attentive message passing: each client is sent a mean of all models in which similar models weigh more (FedAMP).

Source: Huang et al. 2021, arXiv 2007.03797. No authors' code was found; the arithmetic is that of a review of the paper
(creatis-myriad.github.io, 23 November 2022) and of two programs by others: TsingZ0/PFLlib, commit 0998c54,
system/flcore/servers/serveramp.py and clients/clientamp.py, and WwZzz/easyFL, commit 0bc05fd,
resources/algorithm/fedamp.py.

Unread: the paper itself, beyond the equations in the review; so the defaults are not those of its experiments.
"""

import numpy as np

from fedsim.params import flatten, unflatten
from fedsim.registry import component
from fedsim.search_space import Field, Linear, Log
from fedsim.servers import Averaging


@component
class FedAMP(Averaging):
    """A client k is sent u_k = w_k + sum_j xi_kj (w_j - w_k), where w_j is the model that client j last sent.

    xi_kj is attention / n times exp(-|w_k - w_j|^2 / sigma), for n clients that have sent a model. It is the paper's
    step size alpha times the derivative of 1 - exp(-d / sigma), with alpha = attention * sigma / n, so u_k is always
    between the models. The client starts from u_k, with mu / 2 times the squared distance to u_k added to its loss; mu
    is lambda / alpha in the paper. It is evaluated with what it has trained. The mean of the cohort's models goes to
    clients that have not sent a model.

    As sigma grows, FedAMP with attention 1 becomes `fedprox` if all clients train in each round (`fedavg` with mu 0).
    With attention 0 and mu 0, clients train alone. mu 1 and sigma 1 are PFLlib's defaults.

    Computing all u_k takes about K^2 P operations on the driver, for K clients with P parameters each; the models take
    K P numbers in memory and in each checkpoint.

    Differs: PFLlib starts clients from their own last models, and its proximal term is not squared. The paper's
    variant with cosines (HeurFedAMP) is not implemented.
    """

    unicasts = True

    attention: float = Field(
        1.0,
        ge=0,
        le=1,
        search=Linear(0.0, 1.0),
        description="n times the weight of each other model in a client's mean of n models, if all are equal",
    )
    sigma: float = Field(
        1.0, gt=0, search=Log(1e-3, 1e3), description="squared distance of two models at which attention falls to 1/e"
    )
    mu: float = Field(1.0, ge=0, search=Log(1e-3, 1.0), description="weight of the proximal term")

    def unicast(self, client, bank, params):
        if client not in bank:
            return params
        model = bank[client].astype(np.float64)
        mean = model.copy()
        for other in bank.values():
            gap = other - model
            mean += self.attention / len(bank) * np.exp(-gap @ gap / self.sigma) * gap
        return unflatten(mean.astype(flatten(params).dtype), params)

    def gradient(self, params, received, client_state, sent):
        return {name: self.mu * (params[name] - received[name]) for name in received}
