"""A small CNN that also learns zero-shot CLIP's predictions, averaged over clients.

Source: foundation model distillation, Wu, Lin, Willmott, Condessa, Huang, Li and Ganesh 2023, arXiv 2311.08479; not
checked against code, of which we found none. The divergence is that of Hinton, Vinyals and Dean 2015, arXiv 1503.02531.
"""

from itertools import pairwise
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Batch, Method
from fedsim.methods._distillation import divergence
from fedsim.methods._tuned_towers import compared
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class Distil(Method):
    """Clients train on labels and CLIP's predictions; an evaluation needs the CNN alone.

    The loss is the cross-entropy plus `distillation` * T^2 * KL(CLIP || CNN), both predictions at the temperature T.
    CLIP sees the same image, or the same augmented view of it, at CLIP's resolution. With a weight of 0 it is not run,
    and this is FedAvg on a CNN.

    Unread: the paper, beyond its abstract. The CNN, the step size, the weight and the temperature of the divergence are
    ours.
    Differs: the CNN's normalization is by groups of channels, so that there are no running statistics to average.
    """

    distillation: float = Field(
        1.0, ge=0, search=Log(0.01, 10.0), description="weight of the divergence from zero-shot CLIP; 0: none"
    )
    temperature: float = Field(
        1.0, gt=0, search=Choice((1.0, 2.0, 4.0)), description="by which both logits are divided in the divergence"
    )
    resolution: int = Field(32, ge=8, le=4096, description="width and height in pixels of the images that the CNN sees")
    width: int = Field(
        64, ge=1, le=1024, search=Choice((16, 32, 64)), description="channels of its first layer, doubled by each other"
    )
    layers: int = Field(3, ge=1, le=8, description="its convolutions, each of which halves width and height")

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("pixels",)

    def build(self, backbone: Backbone) -> nn.Module:
        return _Student(backbone, self)

    def loss(self, module: "_Student", batch: Batch) -> Tensor:
        logits = module(batch.x, batch.classes)
        loss = cross_entropy(logits, batch.y)
        if not self.distillation:
            return loss
        indices, _ = compared("cross_entropy", batch)
        student, teacher = logits[:, indices], module.teacher(batch.x)[:, indices]
        return loss + self.distillation * divergence(student, teacher, self.temperature)


class _Student(nn.Module):
    class_embeddings: Tensor  # (C, D)

    def __init__(self, backbone: Backbone, method: Distil) -> None:
        super().__init__()
        self.tower, self.scale, self.resolution = backbone.image, backbone.logit_scale, method.resolution
        self.register_buffer("class_embeddings", backbone.class_embeddings, persistent=False)
        channels = [3, *(method.width << layer for layer in range(method.layers))]
        layers = []
        for before, after in pairwise(channels):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(gcd(after, 8), after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], len(backbone.class_embeddings))

    @torch.no_grad()
    def teacher(self, x: Tensor) -> Tensor:
        """(B, C) zero-shot logits."""
        return self.scale * normalize(self.tower.encode(x), dim=-1) @ self.class_embeddings.T

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 3, H, W) -> (B, C)
        x = x.to(self.head.weight.dtype) / 127.5 - 1
        x = interpolate(x, (self.resolution, self.resolution), mode="area")
        return self.head(self.layers(x).mean(dim=(2, 3)))
