"""A shared domain-invariant and a private domain-aware adapter after each block of the image tower (FedSDAF).

Source: Li et al. 2025, arXiv 2505.02515, equations 1 to 6 of the source in pizzareapers/FedSDAF, commit 79ccc4f; what
they leave open as in the authors' code, pizzareapers/MyFedCode, commit c847d74: network/modified_vit.py and train.py.

Unread: along which dimension the equations concatenate, of which predictions their cross-entropy is, and the optimizer
beyond its step size. Tokens are concatenated here, as the code's attention layers, which it does not call, have the
width of one token; its output at the aware adapter's tokens counts. As in the code, the cross-entropy is that of both
predictions, and SGD has momentum and weight decay.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch, Method, Scope
from fedsim.methods._adapters import Bottleneck, added
from fedsim.methods._distillation import divergence
from fedsim.methods._tuned_towers import Side, TunedTowers, compared
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class FedSDAF(Method):
    """With h the output of a block, h + A(h) / 2 + MHSA(LN[B(h); h]) / 2: A is shared, B and the attention are private.

    Clients are evaluated with that, and learn from it and from h + A(h), each the teacher of the other. Adapters start
    at random, so that round 0 is not zero-shot CLIP. The paper's 200 rounds, and averaging by rows, are set in the
    experiment, as are the corrections of its local optimizer (`--server scaffold`, which needs SGD without momentum).

    Differs: the paper has a vision transformer that was trained on ImageNet, and the code a head that it trains; here
    the image tower and the class texts are CLIP's.
    Differs: the code has no attention, but a layer norm after each block, and steps one adapter with the predictions of
    the other fixed, and then the other; here both minimize the paper's loss together. The code copies the weights from
    which it computes an update only after training, so that clients send zeros, and reports the best round and client
    on test rows of the target; neither is done here.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    lr: float = Field(1e-3, search=Log(1e-4, 1e-1))
    momentum: float = 0.9
    weight_decay: float = 5e-4
    local_epochs: int = Field(30, search=Choice((1, 5, 10, 30)))
    batch_size: int = 128
    reduction: int = Field(
        4, ge=1, search=Choice((2, 4, 8, 16)), description="width of the tower per unit of width of the adapters"
    )
    heads: int = Field(8, ge=1, description="heads of the attention, which divide the width of the tower")
    distillation: float = Field(1.0, ge=0, search=Log(0.1, 10.0), description="weight of the divergences")

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("image_adapters",)

    def build(self, backbone: Backbone) -> "_Integrated":
        return _Integrated(backbone, self)

    def loss(self, module: "_Integrated", batch: Batch) -> Tensor:
        indices, targets = compared("cross_entropy", batch)
        invariant, aware = module.shared.score(batch.x, indices), module.score(batch.x, indices)
        divergences = divergence(aware, invariant) + divergence(invariant, aware)
        losses = cross_entropy(invariant, targets) + cross_entropy(aware, targets)
        return losses + self.distillation * divergences

    def scope(self, name: str) -> Scope:
        return "shared" if name.startswith("shared.") else "private"


class _Invariant(TunedTowers):
    """CLIP with the shared adapters alone."""

    def __init__(self, backbone: Backbone, method: FedSDAF) -> None:
        super().__init__(backbone, "image")
        self.adapters = _adapters(backbone, method)

    def insertions(self, side: Side) -> Insertions:
        return added(self.adapters.children())


class _Integrated(TunedTowers):
    """CLIP with the shared and the private adapters."""

    def __init__(self, backbone: Backbone, method: FedSDAF) -> None:
        """
        Raises:
            InputError: the adapters or their heads do not fit the image tower.
        """
        super().__init__(backbone, "image")
        width = backbone.image.width
        if width % method.heads:
            raise InputError(f"--method.heads must divide {width}, the image tower's width; {method.heads} does not")
        if width < method.reduction:
            raise InputError(
                f"--method.reduction must be at most {width}, the image tower's width, not {method.reduction}"
            )
        self.shared, self.own = _Invariant(backbone, method), _adapters(backbone, method)
        self.attention = nn.ModuleList(_Attention(width, method.heads) for _ in self.own)

    def insertions(self, side: Side) -> Insertions:
        parts = zip(self.shared.adapters.children(), self.own.children(), self.attention.children(), strict=True)
        return Insertions(after={k: partial(_integrated, *part) for k, part in enumerate(parts)})


def _integrated(
    invariant: nn.Module, aware: nn.Module, attention: nn.Module, block: Any, x: Tensor, y: Tensor
) -> Tensor:
    return y + (attention(aware(y), y) + invariant(y)) / 2


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, aware: Tensor, y: Tensor) -> Tensor:  # (B, T, W) each -> (B, T, W)
        tokens = self.norm(torch.cat([aware, y], dim=1))
        return self.attend(tokens[:, : y.shape[1]], tokens, tokens, need_weights=False)[0]


def _adapters(backbone: Backbone, method: FedSDAF) -> nn.ModuleList:
    """One for each block of the image tower."""
    width = backbone.image.width
    return nn.ModuleList(Bottleneck(width, width // method.reduction, gelu) for _ in range(backbone.image.depth))
