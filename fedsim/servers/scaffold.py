"""FedAvg whose clients correct each step by how far their own gradient is known to lie from everybody's.

Source: Karimireddy et al. 2020, arXiv 1910.06378, with its option II: a client's variate is the mean of the gradients
of its last round, read off how far it went. No authors' code was found: not checked against code.
"""

import torch

from fedsim.errors import InputError
from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Reply, Server
from fedsim.updates import apply_update, mean_delta

OF = "variate."  # before a parameter's name, where its variate is kept, sent or returned


@component
class Scaffold(Server):
    """Wants plain sgd; twice the bytes of FedAvg both ways, and a kept variate per client."""

    lr: float = Field(
        1.0, gt=0, search=Log(0.01, 10.0), description="step size of the server; 1 as in the paper's experiments"
    )

    def adapt(self, method):
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

    def init(self, params):
        variate = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}
        return {"variate": variate}, {OF + name: torch.zeros_like(value) for name, value in params.items()}

    def broadcast(self, slots, params):
        return {OF + name: slots["variate"][name].to(value.dtype) for name, value in params.items()}

    def gradient(self, params, received, client_state, sent):
        return {name: sent[OF + name] - client_state[OF + name] for name in received}

    def reply(self, update):
        past, sent = update.client_state, update.sent
        if not update.steps:
            return Reply(message={name: torch.zeros_like(value) for name, value in past.items()}, client_state=past)
        length = update.steps * update.method.lr
        mean = {OF + name: (tensor - update.trained[name]) / length for name, tensor in update.received.items()}
        variate = {name: past[name] - sent[name] + mean[name] for name in past}
        return Reply(message={name: variate[name] - past[name] for name in past}, client_state=variate)

    def step(self, params, slots, total, rng):
        delta = mean_delta(total, params)
        # Over all clients, and not the cohort: who did not train keeps its variate as it was.
        change = unflatten(total.message / total.population, params)
        variate = {name: slots["variate"][name] + change[name] for name in params}
        return apply_update(params, {name: self.lr * delta[name] for name in params}), {"variate": variate}
