"""A shared LoRA expert, then a private one and a gate between them; blocks are activated round by round (FedMS).

Source: Wu et al. 2023, arXiv 2312.15926 (FedMS), and 2024, IEEE TMC (FedFMSL), which name one system; not checked
against code, as none is public. From their abstracts: a global expert is trained in a first stage and a local one in a
second; a gate decides between the two, and its adapter is averaged in each round of the second stage; low-rank pairs
are inserted into transformer blocks and activated progressively.

Unread: the rest of the papers. What tells when a further block is activated, and which; how long the first stage is;
the gate's network and what it weighs; how local experts start; towers, ranks and the optimizer. Here the number of
rounds decides, from the last block to the first, in each stage again; the gate is a linear layer on the frozen image
feature, and weighs logits; local experts start as zero-shot CLIP; the rest is as in `lora`.
"""

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.methods import Backbone, Batch, ClientContext, Scope
from fedsim.methods._tuned_towers import among, compared, loss_of
from fedsim.methods.lora import Lora, Paired
from fedsim.registry import component
from fedsim.search_space import Choice, Field

BLOCK = re.compile(r"\.(image|text)/.*blocks/(\d+)/")  # the tower of a pair, and its block


@component
class FedMS(Lora):
    """In the second stage the shared expert is frozen, and only the gate's 2 D + 2 numbers change on the server.

    In the first stage a client is evaluated with the shared expert, later with the mixture. With all blocks from round
    1 on (`rounds_per_block: 0`), the first stage is `lora`.

    Differs: what is not trained in a round is sent all the same, and its bytes are counted. Operations are those of the
    first stage; a step of the second takes two passes.
    """

    first_stage: int = Field(
        10, ge=0, le=10**9, search=Choice((5, 10, 20)), description="rounds in which only the shared expert is trained"
    )
    rounds_per_block: int = Field(
        1,
        ge=0,
        le=10**9,
        search=Choice((0, 1, 2, 4)),
        description="rounds of a stage after which one block more is trained; 0: all blocks from its first round on",
    )

    reads_client = True

    def build(self, backbone: Backbone) -> "_Experts":
        return _Experts(self, backbone)

    def loss(self, module: "_Experts", batch: Batch) -> Tensor:
        if not self._second(batch.client):
            return super().loss(module, batch)
        indices, targets = compared(self.objective, batch)
        return loss_of(self.objective, module.mixed(batch.x, indices), targets)

    def logits(
        self, module: "_Experts", x: Tensor, classes: Tensor | None = None, client: ClientContext | None = None
    ) -> Tensor:
        return among(module.mixed, x, classes) if self._second(client) else module(x, classes)

    def _second(self, client: ClientContext | None) -> bool:
        return client is not None and client.round > self.first_stage

    def learned(self, names: Collection[str], round: int) -> Collection[str]:
        second = round > self.first_stage
        chosen = {name for name in names if name.startswith(("own.", "gate.")) == second}
        if not self.rounds_per_block:
            return chosen
        count = 1 + (round - self.first_stage * second - 1) // self.rounds_per_block
        blocks = {name: (found[1], int(found[2])) for name in chosen if (found := BLOCK.search(name))}
        first = {side: 1 + max(k for s, k in blocks.values() if s == side) - count for side, _ in blocks.values()}
        return {name for name in chosen if name not in blocks or blocks[name][1] >= first[blocks[name][0]]}

    def scope(self, name: str) -> Scope:
        return "private" if name.startswith("own.") else "shared"


class _Experts(Paired):
    """The shared expert, with the private one under `own.`."""

    def __init__(self, method: FedMS, backbone: Backbone) -> None:
        super().__init__(method, backbone)
        self.own, self.gate = Paired(method, backbone), nn.Linear(backbone.width, 2)
        nn.init.zeros_(self.gate.weight)  # both experts weigh the same at first
        nn.init.zeros_(self.gate.bias)

    def mixed(self, x: Tensor, indices: Tensor | slice) -> Tensor:
        """(B, n) logits of the classes at these indices, by both experts."""
        with torch.no_grad():
            features = self.image_tower.encode(x) if self.image_tower else x
        shares = self.gate(normalize(features, dim=-1)).softmax(dim=-1)  # (B, 2)
        return shares[:, :1] * self.score(x, indices) + shares[:, 1:] * self.own.score(x, indices)
