"""FedAvg whose clients correct each step by how far their own gradient is known to lie from everybody's.

Source: Karimireddy et al. 2020, arXiv 1910.06378, with its option II: a client's variate is the mean of the gradients
of its last round, read off how far it went. No authors' code was found: not checked against code.
"""

from typing import Literal

import torch

from fedsim.errors import InputError
from fedsim.params import payload_bytes, unflatten
from fedsim.registry import component
from fedsim.search import Field, Log
from fedsim.servers import Server
from fedsim.updates import apply_update, mean_delta

OF = "variate."  # before a parameter's name, where its variate is kept, sent or returned


@component
class Scaffold(Server):
    """Wants plain sgd; twice the bytes of FedAvg both ways, and a kept variate per client."""

    weighting: Literal["uniform"] = Field("uniform", description="weight of a client in the mean: 1, as in the paper")
    lr: float = Field(
        1.0, gt=0, search=Log(0.01, 10.0), description="step size of the server; 1 as in the paper's experiments"
    )

    def fit(self, method):
        if method.optimizer != "sgd":
            raise InputError(
                "scaffold reads mean gradients off how far clients go, which only plain sgd lets it; "
                f"set --method.optimizer sgd (and an lr for it), not {method.optimizer}"
            )
        if method.momentum:
            raise InputError(
                "scaffold reads mean gradients off how far clients go, which momentum lengthens; "
                f"set --method.momentum 0, not {method.momentum:g}"
            )
        return method

    def sends(self, slots, params):
        known = slots.get("variate", {})
        return {OF + n: known[n].to(v.dtype) if n in known else torch.zeros_like(v) for n, v in params.items()}

    def keeps(self, params):
        return {OF + name: torch.zeros_like(value) for name, value in params.items()}

    def correction(self, kept, sent):
        return {name.removeprefix(OF): sent[name] - kept[name] for name in sent}

    def settle(self, kept, sent, received, trained, steps, lr):
        if not steps:
            return kept, {name: torch.zeros_like(value) for name, value in kept.items()}
        went = {OF + name: (received[name] - trained[name]) / (steps * lr) for name in received}
        now = {name: kept[name] - sent[name] + went[name] for name in kept}
        return now, {name: now[name] - kept[name] for name in kept}

    def payload(self, shared, server, cohort):
        down, up = super().payload(shared, server, cohort)
        return down + payload_bytes(shared), up + payload_bytes(shared)

    def step(self, params, slots, total):
        delta = mean_delta(total, params)
        # Over all clients, and not the cohort: who did not train keeps its variate as it was.
        change = unflatten(total.message / total.population, params)
        variate = {n: slots["variate"][n] + change[n] for n in params} if "variate" in slots else change
        return apply_update(params, {name: self.lr * delta[name] for name in params}), {"variate": variate}
