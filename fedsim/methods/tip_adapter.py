"""Trainable cache with one key per class, added to the zero-shot logits (Tip-Adapter-F).

Keys reveal image features. The gradient of a key is a weighted sum of the client's image features: it pulls toward the
mean feature of the key's class, and with a single image of a class, toward the feature of that image. The server sees
the keys of each client, and the clients see their mean.

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
    """Defaults are those of the code for ImageNet.

    alpha and beta are the start of its search, which uses test rows for ImageNet and validation rows for other sets.
    Its 20 epochs correspond to the rounds of an experiment.

    Differs: the code decays the step size with a cosine over all steps, here constant (`schedule: cosine`: by round).
    Differs: the published cache has a key per training image, which a federation would have to send. Here each class
    has one key, which stands for `shots` images and starts at the class embedding: round 0 ranks as zero-shot CLIP.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    eps: float = 1e-4
    weight_decay: float = 0.01
    batch_size: int = Field(256, search=Choice((32, 64, 128, 256)))
    # The ranges of alpha and beta are those that the code searches for ImageNet.
    alpha: float = Field(
        1.17, ge=0, search=Linear(0.1, 3.0), description="weight of the cache relative to the zero-shot logits"
    )
    beta: float = Field(
        1.0, gt=0, search=Linear(0.1, 7.0), description="sharpness of the affinity between image and key"
    )
    shots: int = Field(16, ge=1, description="images per class that a key stands for; multiplies alpha")
    # `means` is the training-free form: with SGD, lr 1, no decay and a batch of all rows, a step lands on the means.
    objective: Literal["cross_entropy", "means"] = Field(
        "cross_entropy", description="train keys by classification (Tip-Adapter-F), or move them to the class means"
    )

    def build(self, backbone: Backbone) -> nn.Module:
        return _Keyed(backbone, self.alpha * self.shots, self.beta)

    def loss(self, module: "_Keyed", batch: Batch) -> Tensor:
        x, y, classes = batch.x, batch.y, batch.classes
        if self.objective == "cross_entropy":
            return cross_entropy(module(x, classes), y)
        one_hot = (y.unsqueeze(-1) == torch.arange(len(module.keys), device=y.device)).to(x.dtype)
        distances = (normalize(x, dim=-1) - module.keys[y]).square().sum(dim=-1)
        return (distances / one_hot.sum(dim=0)[y]).sum() / 2


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
        affinity = torch.exp(self.beta * (unit @ self.keys.T - 1))
        return self.scale * unit @ self.text.T + self.strength * affinity
