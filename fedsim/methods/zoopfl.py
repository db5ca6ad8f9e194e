"""A learned change of the images that a black-box CLIP is given, with a part of each client's own (ZooPFL).

Source: Lu, Yu, Wang, Teney, Wang, Chen, Yang, Xie and Ji 2023, arXiv 2310.05143; not checked against code, of which we
found none.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Method, Scope
from fedsim.registry import component
from fedsim.search_space import Choice, Field

CELL = 4  # pixels, width and height


@component
class ZooPFL(Method):
    """An auto-encoder changes each image and a linear map CLIP's logits; gradients are estimated (`estimator` spsa).

    The encoder sees the image as `cells` x `cells` cells of 4 x 4 pixels. A client's private embedding joins the code
    of each cell, and what the decoder makes of both is added to the image at its own resolution. The linear map is
    private too. Before training both change nothing: round 0 is zero-shot CLIP.

    Unread: the paper, beyond its abstract, which names the auto-encoder, its low-dimensional embedding of each client,
    linear projections of the predictions, and zeroth-order optimization. The layers, what is shared, the estimator and
    all values are ours.
    Differs: the auto-encoder is not trained to reproduce images, since it makes what is added to them; and the linear
    map, whose gradient a client could compute, is trained by the same estimates.
    """

    estimator: Literal["autograd", "spsa"] = "spsa"
    directions: int = 4
    cells: int = Field(8, ge=1, le=1024, search=Choice((4, 8, 16)), description="rows and columns of cells of an image")
    width: int = Field(8, ge=1, le=1024, search=Choice((4, 8, 16)), description="numbers in the code of a cell")
    embedding: int = Field(
        8, ge=0, le=1024, search=Choice((4, 8, 16)), description="numbers in a client's private embedding"
    )

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("pixels",)

    def build(self, backbone: Backbone) -> nn.Module:
        return _Rewritten(backbone, self)

    def scope(self, name: str) -> Scope:
        return "private" if name in ("embedding", "remap") else "shared"


class _Rewritten(nn.Module):
    class_embeddings: Tensor  # (C, D)

    def __init__(self, backbone: Backbone, method: ZooPFL) -> None:
        super().__init__()
        self.tower, self.scale, self.size = backbone.image, backbone.logit_scale, method.cells * CELL
        text = backbone.class_embeddings
        self.register_buffer("class_embeddings", text, persistent=False)
        self.encoder = nn.Conv2d(3, method.width, CELL, stride=CELL)
        self.decoder = nn.ConvTranspose2d(method.width + method.embedding, 3, CELL, stride=CELL)
        for parameter in self.decoder.parameters():
            nn.init.zeros_(parameter)
        self.embedding = nn.Parameter(torch.empty(method.embedding).normal_())
        self.remap = nn.Parameter(torch.eye(len(text)))

    def change(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) bytes -> (B, 3, H, W) what is added to them."""
        small = interpolate(x.to(self.remap.dtype), (self.size, self.size), mode="area")
        codes = self.encoder(small / 127.5 - 1).tanh()
        own = self.embedding.view(1, -1, 1, 1).expand(len(x), -1, *codes.shape[2:])
        return 127.5 * interpolate(self.decoder(torch.cat([codes, own], dim=1)), x.shape[2:])

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 3, H, W) -> (B, C)
        features = self.tower.encode(x + self.change(x))
        logits = self.scale * normalize(features, dim=-1) @ self.class_embeddings.T
        return logits @ self.remap.T
