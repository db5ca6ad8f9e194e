"""Federated learning with dynamic regularization (FedDyn).

Source: Acar et al. 2021, arXiv 2111.04263; alpha as in the authors' code, alpemreacar/FedDyn, commit 48a19fa.
"""

import torch

from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Reply, Server
from fedsim.updates import apply_update, mean_delta

PREFIX = "gradient."  # of parameter names in the client state


@component
class FedDyn(Server):
    """Each client stores an estimate of its gradient where it last stopped and subtracts it from all its gradients.

    alpha 0.01 is that of the code's two examples (example_cifar_10.py, example_synthetic.py).

    Differs: the code divides alpha by each client's rows relative to the mean; here all clients have the same alpha.
    The code evaluates plain means of the clients' models; here the model that clients receive is evaluated.
    """

    averages = False

    alpha: float = Field(
        0.01,
        gt=0,
        search=Log(1e-3, 1e-1),
        description="weight of the pull toward the received parameters, tuned in the paper from 0.001 to 0.1",
    )

    def init(self, params):
        drift = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}
        return {"drift": drift}, {PREFIX + name: torch.zeros_like(value) for name, value in params.items()}

    def gradient(self, params, received, client_state, sent):
        return {n: self.alpha * (params[n] - received[n]) - client_state[PREFIX + n] for n in received}

    def reply(self, update):
        deltas = {PREFIX + name: update.trained[name] - tensor for name, tensor in update.received.items()}
        state = {name: value - self.alpha * deltas[name] for name, value in update.client_state.items()}
        return Reply(client_state=state)

    def step(self, params, slots, total, rng):
        delta = mean_delta(total, params)
        # Divided by the population, not the cohort: drift stays the mean of all clients' states.
        share = self.alpha * total.weight / total.population
        drift = {name: slots["drift"][name] - share * delta[name] for name in params}
        step = {name: delta[name] - drift[name] / self.alpha for name in params}
        return apply_update(params, step), {"drift": drift}
