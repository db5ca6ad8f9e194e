"""Clients whose losses are bent so that all of them can be least at one and the same place.

Source: Acar et al. 2021, arXiv 2111.04263; alpha as in the authors' code, alpemreacar/FedDyn, commit 48a19fa.
"""

from typing import Literal

import torch

from fedsim.registry import component
from fedsim.search import Field, Log
from fedsim.servers import Server
from fedsim.updates import apply_update, mean_delta

OF = "gradient."  # before a parameter's name, in what a client keeps


@component
class FedDyn(Server):
    """A client keeps an estimate of its loss's gradient where it last ended, and takes it off every gradient.

    alpha 0.01 is that of the code's two examples (example_cifar_10.py, example_synthetic.py).

    Differs: the code divides alpha by a client's rows over the mean client's rows; here it is the same for all clients.
    The code judges plain means of the clients' models; here the model that clients are sent is judged.
    """

    weighting: Literal["uniform"] = Field("uniform", description="weight of a client in the mean: 1, as in the paper")
    alpha: float = Field(
        0.01,
        gt=0,
        search=Log(1e-3, 1e-1),
        description="strength of the pull to what was received; the paper tunes it, from 0.001 to 0.1",
    )

    def local_term(self, params, received):
        return self.alpha / 2 * sum((params[name] - received[name]).square().sum() for name in received)

    def keeps(self, params):
        return {OF + name: torch.zeros_like(value) for name, value in params.items()}

    def correction(self, kept, sent):
        return {name.removeprefix(OF): -value for name, value in kept.items()}

    def settle(self, kept, sent, received, trained, steps, lr):
        went = {OF + name: trained[name] - received[name] for name in received}
        return {name: kept[name] - self.alpha * went[name] for name in kept}, {}

    def step(self, params, slots, total):
        delta = mean_delta(total, params)
        past = slots.get("drift", {name: torch.zeros_like(value) for name, value in delta.items()})
        # Over all clients, and not the cohort: this stays the mean of what all of them keep.
        share = self.alpha * total.weight / total.population
        drift = {name: past[name] - share * delta[name] for name in params}
        step = {name: delta[name] - drift[name] / self.alpha for name in params}
        return apply_update(params, step), {"drift": drift}
