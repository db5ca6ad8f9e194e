"""Clients whose losses are bent so that all of them can be least at one and the same place.

Source: Acar et al. 2021, arXiv 2111.04263; alpha as in the authors' code, alpemreacar/FedDyn, commit 48a19fa.
"""

import torch

from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Reply, Server
from fedsim.updates import apply_update, mean_delta

OF = "gradient."  # before a parameter's name, in what a client keeps


@component
class FedDyn(Server):
    """A client keeps an estimate of its loss's gradient where it last ended, and takes it off every gradient.

    alpha 0.01 is that of the code's two examples (example_cifar_10.py, example_synthetic.py).

    Differs: the code divides alpha by a client's rows over the mean client's rows; here it is the same for all clients.
    The code judges plain means of the clients' models; here the model that clients are sent is judged.
    """

    alpha: float = Field(
        0.01,
        gt=0,
        search=Log(1e-3, 1e-1),
        description="strength of the pull to what was received; the paper tunes it, from 0.001 to 0.1",
    )

    def init(self, params):
        drift = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}
        return {"drift": drift}, {OF + name: torch.zeros_like(value) for name, value in params.items()}

    def gradient(self, params, received, client_state, sent):
        return {n: self.alpha * (params[n] - received[n]) - client_state[OF + n] for n in received}

    def reply(self, update):
        deltas = {OF + name: update.trained[name] - tensor for name, tensor in update.received.items()}
        state = {name: value - self.alpha * deltas[name] for name, value in update.client_state.items()}
        return Reply(client_state=state)

    def step(self, params, slots, total, rng):
        delta = mean_delta(total, params)
        # Over all clients, and not the cohort: this stays the mean of what all of them keep.
        share = self.alpha * total.weight / total.population
        drift = {name: slots["drift"][name] - share * delta[name] for name in params}
        step = {name: delta[name] - drift[name] / self.alpha for name in params}
        return apply_update(params, step), {"drift": drift}
