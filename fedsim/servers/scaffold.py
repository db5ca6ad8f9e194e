"""FedAvg with control variates that correct client drift (SCAFFOLD).

Source: Karimireddy et al. 2020, arXiv 1910.06378, with its option II: a client's control variate is the mean gradient
of its last round, computed from its delta. No authors' code was found: not checked against code.
"""

import torch

from fedsim.errors import InputError
from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Reply, Server
from fedsim.updates import apply_update, mean_delta

PREFIX = "variate."  # of parameter names in the client state, the broadcast and the message


@component
class Scaffold(Server):
    """Needs plain SGD. It sends twice the bytes of FedAvg in both directions and stores a variate per client."""

    averages = False

    lr: float = Field(
        1.0, gt=0, search=Log(0.01, 10.0), description="server step size; 1 as in the paper's experiments"
    )

    def adapt(self, method):
        if method.optimizer != "sgd":
            raise InputError(
                "scaffold computes mean gradients from deltas, which needs plain SGD; "
                f"set --method.optimizer sgd (and an lr for it), not {method.optimizer}"
            )
        if method.momentum:
            raise InputError(
                "scaffold computes mean gradients from deltas, which momentum would lengthen; "
                f"set --method.momentum 0, not {method.momentum:g}"
            )
        if method.clip_norm is not None:
            raise InputError(
                "scaffold computes mean gradients from deltas, which clipping would shorten; "
                f"set --method.clip-norm none, not {method.clip_norm:g}"
            )
        return method

    def init(self, params):
        variate = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}
        return {"variate": variate}, {PREFIX + name: torch.zeros_like(value) for name, value in params.items()}

    def broadcast(self, slots, params):
        return {PREFIX + name: slots["variate"][name].to(value.dtype) for name, value in params.items()}

    def gradient(self, params, received, client_state, sent):
        return {name: sent[PREFIX + name] - client_state[PREFIX + name] for name in received}

    def reply(self, update):
        past, sent = update.client_state, update.sent
        if not update.steps:
            return Reply(message={name: torch.zeros_like(value) for name, value in past.items()}, client_state=past)
        length = update.steps * update.lr
        mean = {PREFIX + name: (tensor - update.trained[name]) / length for name, tensor in update.received.items()}
        variate = {name: past[name] - sent[name] + mean[name] for name in past}
        return Reply(message={name: variate[name] - past[name] for name in past}, client_state=variate)

    def step(self, params, slots, total, rng):
        delta = mean_delta(total, params)
        # Divided by the population, not the cohort: the variates of the other clients do not change.
        change = unflatten(total.message / total.population, params)
        variate = {name: slots["variate"][name] + change[name] for name in params}
        return apply_update(params, {name: self.lr * delta[name] for name in params}), {"variate": variate}
