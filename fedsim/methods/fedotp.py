"""A shared and a private prompt, matched with image patches by optimal transport (FedOTP).

Source: Li et al., CVPR 2024, arXiv 2403.00041; details as in the authors' code, HongxiaLee/FedOTP, commit 9948611.
"""

import torch
from torch import Tensor, nn

from fedsim.methods import Backbone, Scope
from fedsim.methods._transport import Transported, TransportMethod
from fedsim.registry import component
from fedsim.search_space import Field, Linear


@component
class FedOTP(TransportMethod):
    """Defaults are those of the authors' script for CIFAR-100.

    The script is scripts/fedotp_cifar100.sh with configs/trainers/GLP_OT/vit_b16.yaml. Its 150 rounds, 10 of 100
    clients per round (all in the first), and averaging by rows are set in the experiment.

    Their few-shot script, scripts/fedotp_few_shot.sh with rn50.yaml, has other values: 16 tokens, entropy 0.01, 5 local
    epochs, a batch size equal to the number of shots; 10 rounds of 10 clients. Their program without flags has 16
    tokens, mass 1 and 5 local epochs.
    """

    length: int = 4
    mass: float = Field(
        0.8, gt=0, le=1, search=Linear(0.3, 1.0), description="fraction of an image's patches that is transported"
    )

    def build(self, backbone: Backbone) -> nn.Module:
        return _Transported(backbone, self)

    def scope(self, name: str) -> Scope:
        return "private" if name == "own" else "shared"


class _Transported(Transported):
    def __init__(self, backbone: Backbone, method: FedOTP) -> None:
        tokens = method.initial_tokens(backbone.text)
        super().__init__(backbone, len(tokens), method, method.mass, balanced=False)
        self.together, self.own = nn.Parameter(tokens), nn.Parameter(method.initial_tokens(backbone.text))

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, T, D) -> (B, C)
        texts = torch.stack([self.texts(self.together, classes), self.texts(self.own, classes)], dim=1)  # (n, 2, D)
        return self.transported(x, texts, classes)
