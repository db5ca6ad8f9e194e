"""Shared code of the rules for LoRA pairs."""

from __future__ import annotations

from dataclasses import fields

from pydantic import InstanceOf
from torch import Tensor

from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch, ClientContext, Method, Scope
from fedsim.methods.lora import Lora, Paired
from fedsim.params import Params
from fedsim.registry import component, name_of
from fedsim.servers import Server


def require_lora(rule: Server, method: Method) -> Lora:
    if not isinstance(method, Lora):
        raise InputError(f"server {name_of(rule)} needs the low-rank pairs of method lora, not {name_of(method)}")
    return method


@component
class Merged(Method):
    """LoRA with a full matrix added to each pair's product; the matrix starts at zero, and clients do not train it."""

    inner: InstanceOf[Lora]

    @classmethod
    def of(cls, method: Lora) -> Merged:
        return cls(inner=method, **{field.name: getattr(method, field.name) for field in fields(Method)})

    @property
    def min_batch(self) -> int:
        return self.inner.min_batch

    @property
    def sites(self):
        return self.inner.sites

    @property
    def reads_client(self) -> bool:
        return self.inner.reads_client

    @property
    def reads_target(self) -> bool:
        return self.inner.reads_target

    def build(self, backbone: Backbone) -> Paired:
        module = self.inner.build(backbone)
        module.add_merged()
        return module

    def loss(self, module: Paired, batch: Batch) -> Tensor:
        return self.inner.loss(module, batch)

    def logits(
        self, module: Paired, x: Tensor, classes: Tensor | None = None, client: ClientContext | None = None
    ) -> Tensor:
        return self.inner.logits(module, x, classes, client)

    def scope(self, name: str) -> Scope:
        return "frozen" if name.startswith("merged.") else self.inner.scope(name)


def products(params: Params) -> Params:
    """up @ down of each pair, in float64, under the name of the full matrix that it is added to."""
    return {
        name.replace("up.", "merged.", 1): up.double() @ params[name.replace("up.", "down.", 1)].double()
        for name, up in params.items()
        if name.startswith("up.")
    }
