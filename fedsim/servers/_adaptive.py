"""Base of the adaptive rules of FedOpt, which differ in how they update the second moment of the mean delta.

Source: Reddi et al. 2021, arXiv 2003.00295, Algorithm 2. As there, moments have no bias correction, and the second
starts at tau**2. tau is the value that the authors' code recommends (google-research/federated, commit a5af8c4,
optimization/README.md and docs/hyperparameters.md).

Differs: the mean is uniform by default; that code weights clients by their rows. It uses Keras optimizers, with beta2
0.999 and a second moment that starts at 0. beta2 0.99 is the paper's value according to Flower's implementation; we
have not read the paper's text.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear, Log
from fedsim.servers import Averaging
from fedsim.updates import apply_update, mean_delta


@component
class Adaptive(Averaging):
    """Takes server steps with a step size per parameter; `tau` limits them where deltas are small."""

    averages = False

    # The authors tune lr and tau per task; their best values for FedAdam and FedYogi are from 10**-2.5 to 1 and from
    # 1e-5 to 0.1. A parameter moves by about lr per round, and CLIP is already accurate: no lr above 1 is searched.
    lr: float = Field(0.01, gt=0, search=Log(1e-4, 1.0), description="server step size; the paper tunes it per task")
    beta1: float = Field(0.9, ge=0, lt=1, search=Linear(0.0, 0.95), description="decay rate of the first moment")
    beta2: float = Field(
        0.99,
        ge=0,
        lt=1,
        search=Choice((0.9, 0.99, 0.999)),
        description="decay rate of the second moment",
    )
    tau: float = Field(
        1e-3,
        gt=0,
        search=Log(1e-5, 1e-1),
        description="added to the square root of the second moment, which starts at tau**2",
    )

    @abstractmethod
    def second_moment(self, past: Tensor, delta: Tensor) -> Tensor:
        """The second moment after this round's mean delta."""

    def init(self, params):
        first = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}
        second = {name: torch.full_like(value, self.tau**2) for name, value in first.items()}
        return {"first": first, "second": second}, {}

    def step(self, params, slots, total, rng):
        delta = mean_delta(total, params)
        first = {name: self.beta1 * slots["first"][name] + (1 - self.beta1) * delta[name] for name in params}
        second = {name: self.second_moment(slots["second"][name], delta[name]) for name in params}
        step = {name: self.lr * first[name] / (second[name].sqrt() + self.tau) for name in params}
        return apply_update(params, step), {"first": first, "second": second}
