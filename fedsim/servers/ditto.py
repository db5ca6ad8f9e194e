"""Every client trains a second model of its own beside the shared one, pulled toward what it received.

Source: Li et al. 2021, arXiv 2012.04221; lam and the mean as in the authors' code, litian96/ditto, commit 26d9b29.
"""

import torch
from pydantic import InstanceOf
from torch import Tensor, nn

from fedsim.methods import Backbone, Batch, Method, masked
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Field, Log
from fedsim.servers import Averaging

HALVES = "shared", "own"


@component
class Ditto(Averaging):
    """FedAvg of the shared models; clients are judged, on held-out domains too, by their own.

    As in the code (flearn/trainers_MTL/ditto.py), a client's two models step on the same batches, and the mean is
    uniform. lam 1 is that of its scripts; the program's own default is 0, and on request it chooses among 0.1, 1 and 2,
    client by client, on validation rows.

    Differs: the code takes some local steps a round (1 or 2 in its scripts), here a client's local epochs.
    """

    lam: float = Field(
        1.0, ge=0, search=Log(0.01, 10.0), description="strength of the pull; the paper tunes it; 0 is training alone"
    )

    def adapt(self, method):
        return _Twins(inner=method, **{name: getattr(method, name) for name in Method.__pydantic_fields__})

    def gradient(self, params, received, client_state, sent):
        pairs = {f"own.{name.removeprefix('shared.')}": tensor for name, tensor in received.items()}
        return {name: self.lam * (params[name] - tensor) for name, tensor in pairs.items()}


@component
class _Twins(Method):
    """Any method twice over. What is noted as a loss is the sum; no tensor of one half is in the loss of the other."""

    inner: InstanceOf[Method]

    @property
    def min_batch(self) -> int:
        return self.inner.min_batch

    @property
    def joint_classes(self) -> bool:
        return self.inner.joint_classes

    @property
    def sites(self):
        return self.inner.sites

    def build(self, backbone: Backbone) -> nn.Module:
        # Built twice and not copied, since a copy would copy the towers that a module holds; and as if once, so that
        # the shared half starts where FedAvg does.
        state = torch.get_rng_state()
        own = self.inner.build(backbone)
        torch.set_rng_state(state)
        return _Pair(self.inner.build(backbone), own)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return self.inner.loss(module.shared, batch) + self.inner.loss(module.own, batch)

    def closed_form(self, module: nn.Module, params: Params, batch: Batch) -> tuple[Tensor, Params] | None:
        """Half by half, if the inner method has one."""
        losses, grads = [], {}
        for half in HALVES:
            tensors = {name.removeprefix(f"{half}."): v for name, v in params.items() if name.startswith(f"{half}.")}
            closed = self.inner.closed_form(getattr(module, half), tensors, batch)
            if closed is None:
                return None
            losses.append(closed[0])
            grads |= {f"{half}.{name}": grad for name, grad in closed[1].items()}
        return sum(losses), grads

    def scope(self, name: str):
        half, _, inside = name.partition(".")
        scope = self.inner.scope(inside)
        return "private" if half == "own" and scope == "shared" else scope


class _Pair(nn.Module):
    """Two modules alike; its logits are those of the client's own."""

    def __init__(self, shared: nn.Module, own: nn.Module) -> None:
        super().__init__()
        self.shared, self.own = masked(shared), masked(own)  # the losses call the halves, not the pair

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        return self.own(x, classes)
