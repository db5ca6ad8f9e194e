"""Base of the methods that hold two modules of a method: a shared one, and a client's own."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.methods import Backbone, Batch, ClientContext, masked
from fedsim.methods._wrapper import Wrapper
from fedsim.params import Params
from fedsim.registry import component

HALVES = "shared", "own"


@component
class Halves(Wrapper):
    """Predicts with the own module. What is shared in the method is private in it."""

    def build(self, backbone: Backbone) -> "Pair":
        # Built twice, not copied, since a copy would duplicate the towers that the module holds. Both builds draw the
        # same random numbers, so that the shared half starts where FedAvg does.
        state = torch.get_rng_state()
        own = self.inner.build(backbone)
        torch.set_rng_state(state)
        return Pair(self.inner.build(backbone), own)

    def inner_loss(self, half: nn.Module, batch: Batch) -> Tensor:
        """The method's loss of a half, which reads what the client has received of the shared one."""
        if batch.rule and self.inner.reads_rule:
            batch = batch._replace(rule=batch.rule._replace(received=_inside("shared", batch.rule.received)))
        return self.inner.loss(half, batch)

    def logits(
        self, module: "Pair", x: Tensor, classes: Tensor | None = None, client: ClientContext | None = None
    ) -> Tensor:
        return self.inner.logits(module.own, x, classes, client)

    def survey(self, module: "Pair", batch: Batch) -> Params:
        return self.inner.survey(module.shared, batch)

    def surveyed(self, module: "Pair", total: Params) -> Params:
        tensors = self.inner.surveyed(module.shared, total)
        return {f"{half}.{name}": tensor for half in HALVES for name, tensor in tensors.items()}

    def expand(self, module: "Pair", batch: Batch, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.inner.expand(module.shared, batch, rng)

    def scope(self, name: str):
        half, _, inside = name.partition(".")
        scope = self.inner.scope(inside)
        if half == "own" and scope == "surveyed":
            return "frozen"  # a copy, which does not travel a second time
        return "private" if half == "own" and scope == "shared" else scope

    def clipped(self, grads: Params) -> Params:
        """The gradients of each half, clipped on their own: the shared model trains as without the personal one."""
        return {f"{half}.{n}": v for half in HALVES for n, v in self.inner.clipped(_inside(half, grads)).items()}

    def proximal(self, params: Params) -> Params:
        return {f"{half}.{n}": v for half in HALVES for n, v in self.inner.proximal(_inside(half, params)).items()}

    def learned(self, names: Collection[str], round: int) -> set[str]:
        tensors = dict.fromkeys(names)
        return {f"{half}.{n}" for half in HALVES for n in self.inner.learned(_inside(half, tensors), round)}

    def is_auxiliary(self, name: str) -> bool:
        return self.inner.is_auxiliary(name.partition(".")[2])


class Pair(nn.Module):
    """The shared and the own module of a client; the logits are those of the own one."""

    def __init__(self, shared: nn.Module, own: nn.Module) -> None:
        super().__init__()
        self.shared, self.own = masked(shared), masked(own)  # losses call the halves, not the pair

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        return self.own(x, classes)


def _inside(half: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Those of a half, by their names in it."""
    return {name.removeprefix(f"{half}."): v for name, v in tensors.items() if name.startswith(f"{half}.")}
