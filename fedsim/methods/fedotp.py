"""A shared and a private prompt, matched with image patches by optimal transport (FedOTP).

Source: Li et al., CVPR 2024, arXiv 2403.00041; details as in the authors' code, HongxiaLee/FedOTP, commit 9948611.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.clip.sites import Site
from fedsim.clip.stacked import over_clients
from fedsim.methods import Backbone, Scope
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Field, Linear, Log

MAX_SIMILARITIES = 1 << 22  # transported at once: 32 MB in float64


@component
class FedOTP(PromptMethod):
    """Defaults are those of the authors' script for CIFAR-100.

    The script is scripts/fedotp_cifar100.sh with configs/trainers/GLP_OT/vit_b16.yaml. Its 150 rounds, 10 of 100
    clients per round (all in the first), and averaging by rows are set in the experiment.

    Their few-shot script, scripts/fedotp_few_shot.sh with rn50.yaml, has other values: 16 tokens, entropy 0.01, 5 local
    epochs, a batch size equal to the number of shots; 10 rounds of 10 clients. Their program without flags has 16
    tokens, mass 1 and 5 local epochs.
    """

    length: int = 4
    # Below 0.003 the kernel of opposite patches and texts would underflow, even in float64.
    entropy: float = Field(0.1, ge=0.003, search=Log(0.01, 1.0), description="entropic regularization of the transport")
    mass: float = Field(
        0.8, gt=0, le=1, search=Linear(0.3, 1.0), description="fraction of an image's patches that is transported"
    )
    tolerance: float = Field(1e-3, ge=0, description="change of the scaling at which the iterations stop")
    iterations: int = Field(100, ge=1, description="maximum number of scaling iterations")

    @property
    def sites(self) -> tuple[Site, ...]:
        return "text_tokens", "patch_tokens"

    def build(self, backbone: Backbone) -> nn.Module:
        return _Transported(backbone, self)

    def scope(self, name: str) -> Scope:
        return "private" if name == "own" else "shared"


class _Transported(Prompted):
    def __init__(self, backbone: Backbone, method: FedOTP) -> None:
        tokens = method.initial_tokens(backbone.text)
        super().__init__(backbone, len(tokens), method.length_flag(len(tokens)))
        self.together, self.own = nn.Parameter(tokens), nn.Parameter(method.initial_tokens(backbone.text))
        fields = "entropy", "mass", "tolerance", "iterations"
        self.plan = partial(plan, **{name: getattr(method, name) for name in fields})

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, T, D) -> (B, C)
        texts = torch.stack([self.texts(self.together, classes), self.texts(self.own, classes)], dim=1)  # (n, 2, D)
        rows = max(1, MAX_SIMILARITIES // max(1, 2 * x.shape[1] * len(texts)))
        return self.spread(torch.cat([self._score(part, texts) for part in x.split(rows)]), classes)

    def _score(self, x: Tensor, texts: Tensor) -> Tensor:  # (B, T, D), (n, 2, D) -> (B, n)
        cosines = torch.einsum("btd,nkd->bntk", normalize(x, dim=-1), texts)
        return self.scale * (cosines * over_clients(self.plan, cosines)).sum(dim=(-2, -1))


@torch.no_grad()
def plan(cosines: Tensor, entropy: float, mass: float, tolerance: float, iterations: int) -> Tensor:
    """The transport plan between patches and texts, without gradients, as in the code.

    Differs: the code stops all problems of a batch together, when their mean change is small, so that predictions
    depend on the other images of the batch; here each problem stops on its own.

    Args:
        cosines: (..., T, K) between patches and texts.

    Returns:
        (..., T, K): each text receives mass / K, and no patch gives more than 1 / T.
    """
    patches, texts = cosines.shape[-2:]
    kernel = ((cosines.double() - 1) / entropy).exp()  # float32 would underflow at the code's smallest entropy, 0.01
    give, take = kernel.new_ones(*cosines.shape[:-1], 1), kernel.new_ones(*cosines.shape[:-2], texts, 1)
    active = torch.ones_like(give[..., :1, :], dtype=torch.bool)
    for _ in range(iterations):
        give = torch.where(active, (1 / (patches * (kernel @ take))).clamp(max=1), give)
        new = torch.where(active, mass / (texts * (kernel.mT @ give)), take)
        active = active & ((new - take).abs().mean(dim=-2, keepdim=True) >= tolerance)
        take = new
        if not active.any():
            break
    return (give * kernel * take.mT).to(cosines.dtype)
