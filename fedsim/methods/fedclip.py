"""FedCLIP: a small attention adapter gates the image feature; only the adapter is trained and travels.

Source: Lu, Hu, Wang and Xie 2023, arXiv 2302.13485; details as in the authors' code, microsoft/PersonalizedFL,
folder fedclip, commit 441670e.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedsim.methods import Backbone, Method
from fedsim.registry import component


@component
class FedCLIP(Method):
    """Defaults are those of the authors' code. Its rounds (200) and uniform averaging are the experiment's."""

    lr: float = Field(5e-5, gt=0, description="step size")
    beta2: float = Field(0.98, ge=0, lt=1, description="of adam and adamw")
    eps: float = Field(1e-6, gt=0, description="of adam and adamw")
    weight_decay: float = Field(0.2, ge=0, description="coupled (L2) for adam and sgd, decoupled for adamw")
    objective: Literal["contrastive", "cross_entropy"] = Field(
        "contrastive", description="CLIP's loss over the batch's own texts, or over the classes"
    )

    min_batch: ClassVar[int] = 2  # one image against its own text has nothing to contrast; the code skips it

    def build(self, backbone: Backbone) -> nn.Module:
        return _Gated(backbone)

    def loss(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = module(x)
        if self.objective == "cross_entropy":
            return cross_entropy(logits, y)
        # Column j is the text of image j, so two images of one class are false negatives of each other.
        pairs = logits[:, y]
        own = torch.arange(len(y), device=y.device)
        return (cross_entropy(pairs, own) + cross_entropy(pairs.T, own)) / 2


class _Gated(nn.Module):
    """Softmax attention over the D dimensions, multiplied with the feature before it is normalised."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        width = backbone.width
        self.attention = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Softmax(dim=-1))
        self.register_buffer("text", backbone.prototypes, persistent=False)
        self.scale = backbone.logit_scale

    def forward(self, x: Tensor) -> Tensor:  # (B, D) -> (B, C)
        return self.scale * normalize(self.attention(x) * x, dim=-1) @ self.text.T
