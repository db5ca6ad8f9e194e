"""FedAvg whose clients hold on to the parameters that mattered in their last round (FedJudge).

Source: Yue et al. 2023, arXiv 2309.08173; details as in the authors' code, yuelinan/FedJudge, commit ef2e87e,
main_fed_cl.py, which weights clients by 0.25, 0.25 and 0.5, "by the number of rows" (`weighting: rows`).

Differs: the pull of the code has no effect. It is computed from `parameter.data`, which autograd does not see, and its
received parameters are not copied, so that they change with those that are trained. Here it works. The importance of a
parameter is the magnitude of the last gradient in the code, and here that of the mean gradient of the client's last
round, computed from its delta: for optimizers other than plain SGD it is the mean step, in units of the step size.

Unread: the paper.
"""

import torch

from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Averaging, Reply

PREFIX = "importance."  # of parameter names in the client state


@component
class FedJudge(Averaging):
    """Adds pull * (S + S^2) to a client's loss, with S = sum I |w - w*|.

    w* is what the client received, and I the importance that it stored after the last round in which it trained. A
    client's first round is FedAvg's. Method `lora` with rank 4 and alpha 16 is the code's.
    """

    pull: float = Field(0.5, ge=0, search=Log(1e-3, 10.0), description="weight of S + S^2 in the loss; 0 is fedavg")

    def init(self, params):
        return {}, {PREFIX + name: torch.zeros_like(value) for name, value in params.items()}

    def gradient(self, params, received, client_state, sent):
        gaps = {name: params[name] - tensor for name, tensor in received.items()}
        total = sum((client_state[PREFIX + name] * gap.abs()).sum() for name, gap in gaps.items())
        return {n: self.pull * (1 + 2 * total) * client_state[PREFIX + n] * gap.sign() for n, gap in gaps.items()}

    def reply(self, update):
        state = update.client_state
        if update.steps:
            length = update.steps * update.lr
            state = {PREFIX + n: (update.trained[n] - tensor).abs() / length for n, tensor in update.received.items()}
        return Reply(super().reply(update).weight, client_state=state)
