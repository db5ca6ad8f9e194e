"""Nearest class mean without training: the exact mean image feature of each class over all clients (FedNCM).

A client sends the sum of its features by class. If it has one image of a class, that is the feature of this image.

Source: Legate et al. 2023, arXiv 2306.03937 (FedNCM), of which no code was found: not checked against code.
Unread: whether the paper normalizes features or means, and what it does with a class that has no rows.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from fedsim.methods import Backbone, Batch, Method, Scope
from fedsim.params import Params
from fedsim.registry import component


@component
class NCM(Method):
    """Predicts the class whose mean unit feature is nearest by angle; the server sends the means once, in round 1.

    Round 0 is zero-shot CLIP, and all rounds after the first are the same. Classes without train rows, such as new
    classes, keep their class embeddings.
    """

    def build(self, backbone: Backbone) -> nn.Module:
        return _Means(backbone)

    def scope(self, name: str) -> Scope:
        return "surveyed"

    def survey(self, module: "_Means", batch: Batch) -> Params:
        members = one_hot(batch.y, len(module.means)).double()  # (n, C)
        return {"rows": members.sum(dim=0), "sums": members.T @ normalize(batch.x.double(), dim=-1)}

    def surveyed(self, module: "_Means", total: Params) -> Params:
        means = normalize(total["sums"], dim=-1)  # of the sum: the length of a mean does not matter
        return {"means": torch.where(total["rows"].unsqueeze(-1) > 0, means, module.means)}


class _Means(nn.Module):
    means: Tensor  # (C, D), unit rows

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.register_buffer("means", backbone.class_embeddings.clone())
        self.scale = backbone.logit_scale

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.scale * normalize(x, dim=-1) @ self.means.T
