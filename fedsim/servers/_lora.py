"""What rules for low-rank pairs have in common."""

from __future__ import annotations

from pydantic import InstanceOf
from torch import Tensor, nn

from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch, Method, Scope
from fedsim.methods.lora import Lora
from fedsim.params import Params
from fedsim.registry import component, name_of
from fedsim.servers import Server


def require_lora(rule: Server, method: Method) -> None:
    if not isinstance(method, Lora):
        raise InputError(f"server {name_of(rule)} needs the low-rank pairs of method lora, not {name_of(method)}")


@component
class Merged(Method):
    """Low-rank pairs with a whole matrix next to each, which starts at zero and is not trained."""

    inner: InstanceOf[Lora]

    @classmethod
    def of(cls, method: Lora) -> Merged:
        return cls(inner=method, **{name: getattr(method, name) for name in Method.__pydantic_fields__})

    @property
    def min_batch(self) -> int:
        return self.inner.min_batch

    @property
    def sites(self):
        return self.inner.sites

    def build(self, backbone: Backbone) -> nn.Module:
        module = self.inner.build(backbone)
        module.add_merged()
        return module

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return self.inner.loss(module, batch)

    def scope(self, name: str) -> Scope:
        return "frozen" if name.startswith("merged.") else self.inner.scope(name)


def products(params: Params) -> Params:
    """up @ down of every pair, in float64, by the name of the matrix that it is added to."""
    return {
        name.replace("up.", "merged.", 1): up.double() @ params[name.replace("up.", "down.", 1)].double()
        for name, up in params.items()
        if name.startswith("up.")
    }
