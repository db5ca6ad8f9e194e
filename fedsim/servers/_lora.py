"""Shared code of the rules for LoRA pairs."""

from __future__ import annotations

import torch
from pydantic import InstanceOf

from fedsim.errors import InputError
from fedsim.fleets import Device
from fedsim.methods import Backbone, Method, Scope
from fedsim.methods._wrapper import Wrapper
from fedsim.methods.lora import Lora, Paired
from fedsim.params import Params
from fedsim.registry import component
from fedsim.servers import Server
from fedsim.servers._needs import required


def require_lora(rule: Server, method: Method) -> Lora:
    return required(rule, method, Lora, "low-rank pairs of method lora")


@component
class Merged(Wrapper):
    """LoRA with a full matrix added to each pair's product; the matrix starts at zero, and clients do not train it."""

    inner: InstanceOf[Lora]

    def build(self, backbone: Backbone) -> Paired:
        module = self.inner.build(backbone)
        module.add_merged()
        return module

    def scope(self, name: str) -> Scope:
        return "frozen" if name.startswith("merged.") else self.inner.scope(name)


def first_ranks(params: Params, device: Device) -> Params:
    """Masks of the first rows of each `down` and the first columns of each `up`, as many as the device's rank.

    With both at zero, the rest of a pair has no part in the product and no gradient, and no decay moves it.

    Raises:
        InputError: the pairs have a lower rank.
    """
    masks = {}
    for name, tensor in params.items():
        if name.startswith("down."):
            rank = tensor.shape[-2]
            if (device.rank or 0) > rank:
                raise InputError(f"fleet.ranks can be at most --method.rank {rank}, got {device.rank}")
            first = torch.arange(rank) < (device.rank or rank)
            masks |= {name: first[:, None], name.replace("down.", "up.", 1): first}
    return masks


def products(params: Params) -> Params:
    """up @ down of each pair, in float64, under the name of the full matrix that it is added to."""
    return {
        name.replace("up.", "merged.", 1): up.double() @ params[name.replace("up.", "down.", 1)].double()
        for name, up in params.items()
        if name.startswith("up.")
    }
