"""Personal models near the shared one, which is trained on the Moreau envelopes of the clients' losses (pFedMe).

Source: Dinh, Tran and Nguyen 2020, arXiv 2006.08848; defaults and arithmetic of the authors' code, CharlieDinh/pFedMe,
commit 7e52b22: main.py, FLAlgorithms/users/userpFedMe.py and FLAlgorithms/servers/serverbase.py.

Differs: each inner problem starts from the client's shared model w; the code starts it from the last personal model of
the round. A local step is a batch of a local epoch; the code takes a fixed number of batches per round. In the code
all clients train in each round, and those that are sampled send. It weights them by their rows (`weighting: rows`);
the mean is uniform by default, as in `fedavg`.

Unread: the paper, and a decay of 0.001 toward zero in the inner steps of later versions of the code.
"""

import torch
from pydantic import InstanceOf
from torch import Tensor, nn
from torch.func import grad

from fedsim.methods import Backbone, Batch
from fedsim.methods._calls import with_tensors
from fedsim.methods._halves import Halves, Pair
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Field, Linear, Log
from fedsim.servers import Averaging
from fedsim.updates import apply_update, mean_delta


@component
class PFedMe(Averaging):
    """A client's loss is min over theta of f(theta) + lam / 2 |theta - w|^2, whose gradient by w is lam (w - theta).

    At each local step, theta takes `steps` steps of gradient descent from w on the batch, and the method's optimizer
    takes one step of w. The theta of the last local step is the client's personal model, which is stored and evaluated,
    on held-out domains too. Clients send w; the server moves by `beta` times the mean delta.

    With one inner step and plain SGD, the shared model is FedAvg's with a step size of lr * lam * inner_lr. The outer
    step of the code is plain SGD with lr 0.005 (`--method.optimizer sgd`); inner steps always are plain. CLIP's
    adapters need smaller steps than the code's networks: tune inner_lr.
    """

    averages = False

    lam: float = Field(
        15.0, gt=0, search=Log(0.1, 100.0), description="weight of the pull of a personal model toward the shared one"
    )
    steps: int = Field(5, ge=1, search=Linear(1, 10), description="inner steps for a personal model at a local step")
    inner_lr: float = Field(0.09, gt=0, search=Log(1e-5, 0.1), description="step size of the inner steps")
    beta: float = Field(
        1.0, gt=0, search=Linear(0.5, 2.0), description="server step size; 1 takes the mean of the clients' models"
    )

    def adapt(self, method):
        return _Envelope.of(method, rule=self)

    def step(self, params, slots, total, rng):
        delta = mean_delta(total, params)
        return apply_update(params, {name: self.beta * delta[name] for name in params}), slots


@component
class _Envelope(Halves):
    """Trains the shared half on the envelope of a method's loss. The own half is not trained, but written."""

    rule: InstanceOf[PFedMe]

    changes_gradients = True

    def build(self, backbone: Backbone) -> Pair:
        pair = super().build(backbone)
        _as_buffers(pair.own)
        return pair

    def loss(self, module: Pair, batch: Batch) -> Tensor:
        rule, scopes = self.rule, ("shared", "private")
        shared = {name: w for name, w in module.shared.named_parameters() if self.inner.scope(name) in scopes}
        start = {name: w.detach() for name, w in shared.items()}

        def of(theta: Params) -> Tensor:
            return with_tensors(self.inner_loss, module.own, theta, batch)

        theta = start
        for _ in range(rule.steps):
            slopes = grad(of)(theta)
            theta = {n: t - rule.inner_lr * (slopes[n] + rule.lam * (t - start[n])) for n, t in theta.items()}
        with torch.no_grad():
            value = of(theta)
            for name, tensor in theta.items():
                module.own.get_buffer(name).copy_(tensor)
        return value + rule.lam / 2 * sum((w - theta[name]).square().sum() for name, w in shared.items())

    def closed_form(self, module: Pair, params: Params, batch: Batch) -> None:
        return None  # the method's is that of another loss


def _as_buffers(module: nn.Module) -> None:
    """Makes buffers of all parameters, so that no optimizer steps them."""
    for part in module.modules():
        for name, tensor in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, tensor.detach())
