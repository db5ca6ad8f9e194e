"""Private adapters in the last blocks of both towers, around a shared projection that serves both (pFedMMA).

Source: Ghiasvand, Alizadeh and Pedarsani, ICLR 2026, arXiv 2507.05394; details as in the authors' code,
sajjad-ucsb/pFedMMA, commit 84197bb. The adapters are those of MMA, Yang et al., CVPR 2024, of whose code
(ZjjConan/Multi-Modal-Adapter, commit 274cb0b) it has clip/model.py.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Method, Scope
from fedsim.methods._tuned_towers import Side, TunedTowers, tower_of
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class PFedMMA(Method):
    """Defaults are those of the authors' script for base-to-new generalization.

    The script is scripts/base2new.sh, with configs/trainers/pFedMMA/vit_b16.yaml. Its 10 clients, 100 rounds, and
    averaging by rows are set in the experiment. Only the shared projections travel: 8,448 of 674,560 numbers with
    ViT-B/16.

    Differs: all clients train in the program's first round. Its class texts are "a photo of a {}.", here `--prompt`. It
    crops and flips images at random, as `--augment` does. With ViT-L/14 it adapts blocks 5 to 12 of both towers, which
    are not the last of the image tower.
    Differs: the program encodes the class texts for its very first evaluation, with the adapters of the first client,
    and uses these in every later evaluation, of all clients; here each evaluation encodes those of its client.
    Unread: whether the paper scales the gradients as its code does; the values here are those of the code.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    lr: float = Field(1e-3, search=Log(1e-4, 1e-1))
    momentum: float = 0.9
    weight_decay: float = 5e-4
    blocks: int = Field(
        8,
        ge=1,
        search=Choice((4, 8, 12)),
        description="number of last blocks with an adapter in each tower (all of the shorter tower, if it has fewer)",
    )
    width: int = Field(32, ge=1, le=4096, search=Choice((8, 16, 32, 64)), description="width of the adapters")
    scale: float = Field(
        1e-3,
        gt=0,
        search=Log(1e-4, 1.0),
        description="factor of an adapter's output, which leaves the gradients of its weights unscaled",
    )

    changes_gradients = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return "image_adapters", "text_adapters"

    def build(self, backbone: Backbone) -> nn.Module:
        return _Adapted(backbone, self)

    def scope(self, name: str) -> Scope:
        return "shared" if name.startswith("shared.") else "private"


class _Adapted(TunedTowers):
    def __init__(self, backbone: Backbone, method: PFedMMA) -> None:
        super().__init__(backbone, "both")
        self.strength = method.scale
        towers = {side: tower_of(backbone, side) for side in self.sides}
        count = min(method.blocks, *(tower.depth for tower in towers.values()))
        self.first = {side: tower.depth - count for side, tower in towers.items()}
        self.adapters = nn.ModuleDict(
            {
                side: nn.ModuleList(_Adapter(tower.width, method.width) for _ in range(count))
                for side, tower in towers.items()
            }
        )
        self.shared = nn.ModuleList(_linear(method.width, method.width) for _ in range(count))

    def insertions(self, side: Side) -> Insertions:
        pairs = zip(self.adapters[side].children(), self.shared, strict=True)
        return Insertions(after={k: partial(self.adapted, *pair) for k, pair in enumerate(pairs, self.first[side])})

    def adapted(self, adapter: "_Adapter", shared: nn.Module, block: Any, x: Tensor, y: Tensor) -> Tensor:
        """The output of a block, plus that of an adapter of what its attention reads."""
        # The factors cancel out in the gradients of the adapter's weights, but not in that of x.
        hidden = relu(adapter.down(block.ln_1(_ScaledGradient.apply(x, self.strength))))
        added = self.strength * adapter.up(relu(shared(hidden)))
        return y + _ScaledGradient.apply(added, 1 / self.strength)


class _Adapter(nn.Module):
    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.down, self.up = _linear(width, narrow), _linear(narrow, width)


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.factor = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer
