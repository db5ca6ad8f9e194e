"""Fair averaging: clients with a larger loss weigh more (q-FedAvg).

Source: Li, Sanjabi, Beirami and Smith 2020, arXiv 1905.10497, q-FedAvg; the arithmetic is that of the authors' code,
litian96/fair_flearn, commit 578cca2, flearn/trainers/qffedavg.py and fedbase.py. The paper tunes q from 0.001 to 15;
q 1 is ours, the program's default is 0.

Differs: the code multiplies deltas by L and divides by L again; here L appears only where it does not cancel out. Its
1e-10, added to the loss, is kept.
"""

import torch

from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Reply, Server
from fedsim.updates import apply_update


@component
class QFedAvg(Server):
    """The step is sum_k F_k^q delta_k / sum_k F_k^q (1 + q L |delta_k|^2 / F_k).

    F_k is the loss of client k with the parameters that it received, over all its train rows. With q 0 this is
    `fedavg`; the larger q, the more the clients count for whom the model is worst. A client sends one number besides
    its delta. Clients without a local step do not count.

    The denominator bounds the curvature of the fair objective, if local training is plain SGD: 1 / L is then its step
    size, as in the paper. Adam's deltas are longer than its step size suggests, so its steps here are short
    unless L is set.
    """

    averages = False
    needs_loss = True
    computes_messages = True

    q: float = Field(
        1.0, ge=0, search=Log(1e-3, 15.0), description="fairness: the power of a client's loss; 0 is fedavg"
    )
    lipschitz: float | None = Field(
        None, ge=0, description="L, the Lipschitz constant of the gradients of the loss (default: 1 / method.lr)"
    )

    def reply(self, update):
        if not update.steps:
            return Reply(0.0, {"curvature": torch.ones((), dtype=torch.float64)})
        loss = max(update.loss, 0.0) + 1e-10
        lipschitz = 1 / update.lr if self.lipschitz is None else self.lipschitz
        squares = [(update.trained[name].double() - tensor).square().sum() for name, tensor in update.received.items()]
        square = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        return Reply(loss**self.q, {"curvature": 1 + self.q * lipschitz / loss * square})

    def step(self, params, slots, total, rng):
        if not total.weight:
            return params, slots
        return apply_update(params, unflatten(total.delta / total.message[0], params)), slots
