"""FedAdam whose second moment moves by a step of bounded size, so that one large delta does not end all later steps.

Source: Reddi et al. 2021, arXiv 2003.00295 (FedOpt). As there, moments are not corrected for their start.
"""

import torch
from pydantic import Field

from fedsim.registry import component
from fedsim.servers import Server, mean_delta, moved


@component
class FedYogi(Server):
    """The second moment goes toward the squared delta by a share of that square, not of the distance to it."""

    lr: float = Field(0.01, gt=0, description="step size of the server; the paper tunes it per task")
    beta1: float = Field(0.9, ge=0, lt=1, description="share of the past first moment that is kept")
    beta2: float = Field(0.99, ge=0, lt=1, description="1 less the share of a squared delta that a step may move by")
    tau: float = Field(1e-3, gt=0, description="added to the root of the second moment, which starts at tau**2")

    def step(self, params, slots, total):
        delta = mean_delta(total, params)
        first = slots.get("first", {name: torch.zeros_like(value) for name, value in delta.items()})
        second = slots.get("second", {name: torch.full_like(v, self.tau**2) for name, v in delta.items()})
        first = {name: self.beta1 * first[name] + (1 - self.beta1) * delta[name] for name in params}
        square = {name: delta[name] ** 2 for name in params}
        # Never below zero: where it shrinks, it is above the square, of which it loses a share.
        second = {n: second[n] - (1 - self.beta2) * square[n] * (second[n] - square[n]).sign() for n in params}
        step = {name: self.lr * first[name] / (second[name].sqrt() + self.tau) for name in params}
        return moved(params, step), {"first": first, "second": second}
