"""FedAvg with server momentum (FedAvgM).

Source: Hsu et al. 2019, arXiv 1909.06335. Momentum 0.9 is the default of FedOpt's code for this rule, and step size 1
was best on four of its six tasks (google-research/federated, commit a5af8c4, optimization/docs/hyperparameters.md). No
code by Hsu et al. was found: otherwise not checked against code.
"""

import torch

from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log
from fedsim.servers import Averaging
from fedsim.updates import apply_update, mean_delta


@component
class FedAvgM(Averaging):
    """With beta 0 and lr 1 this is FedAvg. The mean is uniform by default, as in `fedavg`."""

    averages = False

    lr: float = Field(1.0, gt=0, search=Log(0.01, 10.0), description="server step size")
    beta: float = Field(
        0.9,
        ge=0,
        lt=1,
        search=Choice((0.0, 0.7, 0.9, 0.97, 0.99, 0.997)),  # the paper's
        description="server momentum",
    )

    def init(self, params):
        return {"momentum": {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}}, {}

    def step(self, params, slots, total, rng):
        delta = mean_delta(total, params)
        momentum = {name: self.beta * slots["momentum"][name] + delta[name] for name in params}
        return apply_update(params, {name: self.lr * momentum[name] for name in params}), {"momentum": momentum}
