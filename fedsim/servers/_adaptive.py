"""What the adaptive rules of FedOpt share: two moments of the mean delta; they differ in how the second one moves.

Source: Reddi et al. 2021, arXiv 2003.00295, Algorithm 2. As there, moments are not corrected for their start, and the
second starts at tau**2. tau is what the authors' code advises (google-research/federated, commit a5af8c4,
optimization/README.md and docs/hyperparameters.md).

Differs: uniform is the default, as of all rules; that code weights clients by their rows. Its optimizers are those of
Keras, with beta2 0.999 and a second moment that starts at 0. beta2 0.99 is the paper's by way of Flower's
implementation of it; the paper's own text was not read.
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
    """Steps of a size per parameter; `tau` bounds them where deltas are small."""

    # The authors tune lr and tau per task; their best for FedAdam and FedYogi are from 10**-2.5 to 1 and from 1e-5 to
    # 0.1. A parameter moves by about lr in a round, and what is trained here joins a CLIP that is good already: hence
    # none above 1.
    lr: float = Field(
        0.01, gt=0, search=Log(1e-4, 1.0), description="step size of the server; the paper tunes it per task"
    )
    beta1: float = Field(
        0.9, ge=0, lt=1, search=Linear(0.0, 0.95), description="share of the past first moment that is kept"
    )
    beta2: float = Field(
        0.99,
        ge=0,
        lt=1,
        search=Choice((0.9, 0.99, 0.999)),
        description="1 less the share by which the second moment moves",
    )
    tau: float = Field(
        1e-3, gt=0, search=Log(1e-5, 1e-1), description="added to the root of the second moment, which starts at tau**2"
    )

    @abstractmethod
    def second(self, past: Tensor, delta: Tensor) -> Tensor:
        """The second moment after a delta."""

    def init(self, params):
        first = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}
        second = {name: torch.full_like(value, self.tau**2) for name, value in first.items()}
        return {"first": first, "second": second}, {}

    def step(self, params, slots, total, rng):
        delta = mean_delta(total, params)
        first = {name: self.beta1 * slots["first"][name] + (1 - self.beta1) * delta[name] for name in params}
        second = {name: self.second(slots["second"][name], delta[name]) for name in params}
        step = {name: self.lr * first[name] / (second[name].sqrt() + self.tau) for name in params}
        return apply_update(params, step), {"first": first, "second": second}
