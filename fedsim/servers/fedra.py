"""LoRA in a random subset of the blocks of each client, averaged block by block over the clients that had it (FedRA).

Source: Su et al. 2024, arXiv 2311.11227 (FedRA); the arithmetic is that of the authors' code, leondada/FedRA, commit
0c93dcc, server.py (`get_para_range`, `agg_range_fill`), client.py and main.py.

Differs: the code fine-tunes a ViT of timm without a text tower: also a classification head, by SGD with step size 0.01,
momentum 0.9, weight decay 1e-5 and a largest norm of 10, with rank 8, alpha 8 and dropout 0.1 in the projection of
attention, the last matrix of the MLPs and the patch embedding, and as many batches as the smallest client has. Here the
pairs and how they are trained are those of method `lora`, and CLIP's texts give the classes. The code's devices, one
domain each, train 12, 10, 8, 6, 4 and 3 of 12 blocks.

Unread: the paper beyond its abstract.
"""

import re

import torch
from pydantic import InstanceOf

from fedsim.errors import InputError
from fedsim.methods import Backbone, Scope
from fedsim.methods._wrapper import Wrapper
from fedsim.methods.lora import Lora, Paired
from fedsim.registry import component
from fedsim.servers import Averaging
from fedsim.servers._lora import require_lora

BLOCK = re.compile(r"(?:up|down)\.(image|text)/.*resblocks/(\d+)/")


@component
class FedRA(Averaging):
    """In each round, each client is given random blocks of each tower, as many as `--fleet.blocks` says.

    Its model consists of these blocks; the others are left out, and what is not in a block is always there. The server
    averages the pairs of each block over the clients that had it. A block that no client had stays as it is. The whole
    tower is evaluated. Clients with all blocks, and fleets without `--fleet.blocks`, train as with `fedavg`. A client
    receives and sends a number for each of its blocks, too.
    """

    heeds = frozenset(("blocks",))

    def adapt(self, method):
        if method.persist_optimizer:
            raise InputError("fedra gives clients other blocks in each round; leave --method.persist-optimizer out")
        return _InBlocks.of(require_lora(self, method))

    def held(self, params, device, rng):
        given = {}
        for name in sorted(name for name in params if name.startswith("blocks.")):
            depth, side = len(params[name]), name.removeprefix("blocks.")
            if (device.blocks or 0) > depth:
                raise InputError(
                    f"fleet.blocks can be at most {depth}, the blocks of the {side} tower, got {device.blocks}"
                )
            given[side] = torch.zeros(depth, dtype=torch.bool)
            given[side][torch.randperm(depth, generator=rng)[: device.blocks]] = True
        pairs = {name: match for name in params if (match := BLOCK.match(name))}
        held = {name: given[match[1]][int(match[2])] for name, match in pairs.items()}
        return held | {f"blocks.{side}": blocks for side, blocks in given.items()}


@component
class _InBlocks(Wrapper):
    """LoRA with a number for each block, which is 0 where a client does not have it. Clients do not train them."""

    inner: InstanceOf[Lora]

    def build(self, backbone: Backbone) -> Paired:
        module = self.inner.build(backbone)
        module.add_blocks(backbone)
        return module

    def scope(self, name: str) -> Scope:
        return "shared" if name.startswith("blocks.") else self.inner.scope(name)
