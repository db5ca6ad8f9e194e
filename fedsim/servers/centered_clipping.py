"""Clipping of the clients' deltas around the step of the last round (centered clipping).

Source: Karimireddy, He and Jaggi 2021, arXiv 2012.10333; one iteration, as in the authors' code,
epfml/byzantine-robust-optimizer, commit c6a0092, momentum-robustness/cifar10-all.py, whose radius for momenta of a
ResNet-20 is 100. The radius of 1 is ours, as the bound of `norm_bound`.

Differs: the code clips momenta of gradients, which each client carries on from step to step; here the deltas of local
training are clipped. The paper's guarantee against attacks over many rounds rests on those momenta.

Unread: the paper, but for its abstract.
"""

import torch

from fedsim.params import flatten, unflatten
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log
from fedsim.servers import Server
from fedsim.servers._deltas import distances, weighted_sum
from fedsim.updates import apply_update, stepped


@component
class CenteredClipping(Server):
    """v <- v + mean_k clip(delta_k - v, radius), from the step of the last round, which is zero before the first.

    The result is the step of this round. With a radius above all distances this is uniform `fedavg`. Whatever clients
    with a share b of the round send, they move its step by at most 2 b * radius * iterations.
    """

    averages = False
    needs_deltas = True

    radius: float = Field(
        1.0, gt=0, search=Log(1e-2, 10.0), description="largest distance of a delta to v; longer ones are scaled to it"
    )
    iterations: int = Field(1, ge=1, le=1000, search=Choice((1, 3, 5)), description="iterations per round")

    def init(self, params):
        return {"center": {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}}, {}

    def step(self, params, slots, total, rng):
        clients = len(stepped(total))
        if not clients:
            return params, slots
        center = flatten(slots["center"])
        for _ in range(self.iterations):
            gaps = distances(total, center)
            # v + sum_k w_k (delta_k - v), where n w_k is the factor that clips the gap.
            weights = self.radius / gaps.clip(self.radius) / clients
            center = (1 - weights.sum()) * center + weighted_sum(total, weights)
        step = unflatten(center, params)
        return apply_update(params, step), {"center": step}
