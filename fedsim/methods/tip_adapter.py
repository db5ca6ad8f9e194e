"""A key for every class answers to images like it, beside zero-shot CLIP; only the keys are trained and travel.

What travels is close to the images. The gradient of a key is a weighted sum of the client's own image features: it
pulls toward the mean of those of the key's class, and where there is one image of a class, toward that image's feature.
Who sees one client's keys sees that; the server of a plain mean sees it of every client, and clients see the mean.

Source: Zhang et al. 2021, arXiv 2111.03930 (Tip-Adapter, and Tip-Adapter-F, whose keys are trained); values as in the
authors' code, gaopengcuhk/Tip-Adapter, commit d0e2d6f (main_imagenet.py, configs/imagenet.yaml).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedsim.methods import Backbone, Batch, Method
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear


@component
class TipAdapter(Method):
    """Defaults are the code's for ImageNet.

    They are where it starts to search alpha and beta: on test rows for ImageNet, on validation rows for other sets. Its
    20 epochs are the experiment's rounds.

    Differs: the code lets the step size fall along a cosine over all its steps; ours stays.
    Differs: the published cache has a key per training image, which a federation would have to send. Here each class
    has one, that answers for as many as `shots`, and starts at the prototype: round 0 ranks as zero-shot CLIP does.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    eps: float = 1e-4
    weight_decay: float = 0.01
    batch_size: int = Field(256, search=Choice((32, 64, 128, 256)))
    # Both as far as the code searches them for ImageNet.
    alpha: float = Field(
        1.17, ge=0, search=Linear(0.1, 3.0), description="strength of an answer beside the zero-shot logits"
    )
    beta: float = Field(
        1.0, gt=0, search=Linear(0.1, 7.0), description="sharpness: how alike an image must be to be answered"
    )
    shots: int = Field(16, ge=1, description="images of a class that its key stands for, whose answers add up")
    # The second is the training-free form: with sgd, lr 1, no decay and a batch of all rows, a step lands on the means.
    objective: Literal["cross_entropy", "means"] = Field(
        "cross_entropy", description="train keys to tell classes apart (Tip-Adapter-F), or draw them to class means"
    )

    def build(self, backbone: Backbone) -> nn.Module:
        return _Keyed(backbone, self.alpha * self.shots, self.beta)

    def loss(self, module: "_Keyed", batch: Batch) -> Tensor:
        x, y, classes = batch
        if self.objective == "cross_entropy":
            return cross_entropy(module(x, classes), y)
        mine = (y.unsqueeze(-1) == torch.arange(len(module.keys), device=y.device)).to(x.dtype)
        strayed = (normalize(x, dim=-1) - module.keys[y]).square().sum(dim=-1)
        return (strayed / mine.sum(dim=0)[y]).sum() / 2


class _Keyed(nn.Module):
    text: Tensor

    def __init__(self, backbone: Backbone, strength: float, beta: float) -> None:
        super().__init__()
        self.keys = nn.Parameter(backbone.class_embeddings.clone())
        self.register_buffer("text", backbone.class_embeddings, persistent=False)
        self.scale = backbone.logit_scale
        self.strength, self.beta = strength, beta

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        unit = normalize(x, dim=-1)
        answer = torch.exp(self.beta * (unit @ self.keys.T - 1))
        return self.scale * unit @ self.text.T + self.strength * answer
