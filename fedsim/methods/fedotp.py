"""FedOTP: the patches of an image are shared out between a class's two texts by optimal transport.

One text stands behind tokens that all learn, the other behind a client's own.

Source: Li et al., CVPR 2024, arXiv 2403.00041; details as in the authors' code, HongxiaLee/FedOTP, commit 9948611.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Scope
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Field, Linear, Log

MOST = 1 << 22  # similarities that are shared out at once: 32 MB in float64


@component
class FedOTP(PromptMethod):
    """Defaults are those of the authors' script for CIFAR-100.

    That is scripts/fedotp_cifar100.sh with configs/trainers/GLP_OT/vit_b16.yaml. Its 150 rounds, 10 of 100 clients in
    each (all of them in the first), and averaging by rows are the experiment's.

    Their script for few shots, scripts/fedotp_few_shot.sh with rn50.yaml, has other values: 16 tokens, entropy 0.01, 5
    local epochs, batches of as many rows as a class has shots; 10 rounds of 10 clients. Their program without flags has
    16 tokens, mass 1 and 5 local epochs.
    """

    length: int = 4
    # Below 0.003 patches and texts that are opposite would have nothing to scale, even in float64.
    entropy: float = Field(0.1, ge=0.003, search=Log(0.01, 1.0), description="how evenly the transport spreads")
    mass: float = Field(
        0.8, gt=0, le=1, search=Linear(0.3, 1.0), description="share of an image's patches that is transported"
    )
    tolerance: float = Field(1e-3, ge=0, description="change of the scaling at which the transport is done")
    iterations: int = Field(100, ge=1, description="most scalings of the transport")

    @property
    def sites(self) -> tuple[Site, ...]:
        return "text_tokens", "patch_tokens"

    def build(self, backbone: Backbone) -> nn.Module:
        return _Transported(backbone, self)

    def scope(self, name: str) -> Scope:
        return "private" if name == "own" else "shared"


class _Transported(Prompted):
    def __init__(self, backbone: Backbone, method: FedOTP) -> None:
        tokens = method.start(backbone.text)
        super().__init__(backbone, len(tokens), method.asked(len(tokens)))
        self.together, self.own = nn.Parameter(tokens), nn.Parameter(method.start(backbone.text))
        wanted = "entropy", "mass", "tolerance", "iterations"
        self.transport = {name: getattr(method, name) for name in wanted}

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, T, D) -> (B, C)
        texts = torch.stack([self.texts(self.together, classes), self.texts(self.own, classes)], dim=1)  # (n, 2, D)
        rows = max(1, MOST // max(1, 2 * x.shape[1] * len(texts)))
        return self.spread(torch.cat([self._score(part, texts) for part in x.split(rows)]), classes)

    def _score(self, x: Tensor, texts: Tensor) -> Tensor:  # (B, T, D), (n, 2, D) -> (B, n)
        near = torch.einsum("btd,nkd->bntk", normalize(x, dim=-1), texts)
        return self.scale * (near * plan(near, **self.transport)).sum(dim=(-2, -1))


@torch.no_grad()
def plan(near: Tensor, entropy: float, mass: float, tolerance: float, iterations: int) -> Tensor:
    """How much of each patch goes to each text; a constant, as the code has it.

    Differs: the code stops all problems of a batch at once, when their mean change is small, so that what an image is
    taken for hangs on the others of its batch; here each stops for itself.

    Args:
        near: (..., T, K) cosines.

    Returns:
        (..., T, K): each text receives mass / K, and no patch gives more than 1 / T.
    """
    patches, texts = near.shape[-2:]
    kernel = ((near.double() - 1) / entropy).exp()  # in float32 it would vanish at the code's smallest entropy, 0.01
    give, take = kernel.new_ones(*near.shape[:-1], 1), kernel.new_ones(*near.shape[:-2], texts, 1)
    going = torch.ones_like(give[..., :1, :], dtype=torch.bool)
    for _ in range(iterations):
        give = torch.where(going, (1 / (patches * (kernel @ take))).clamp(max=1), give)
        new = torch.where(going, mass / (texts * (kernel.mT @ give)), take)
        going = going & ((new - take).abs().mean(dim=-2, keepdim=True) >= tolerance)
        take = new
        if not going.any():
            break
    return (give * kernel * take.mT).to(near.dtype)
