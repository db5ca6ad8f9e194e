"""Bottleneck adapter on the image feature with a residual connection (CLIP-Adapter).

Source: Gao et al. 2021, arXiv 2110.04544; details as in the authors' code, gaopengcuhk/CLIP-Adapter, commit 08d07f8.
"""

from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.methods import Backbone, ClientContext, Method
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear


@component
class ClipAdapter(Method):
    """Trains only the adapter; reduction and ratio are those of the authors' code, clip_adapter.py.

    Differs: the training hyperparameters are ours (adam, 1e-3). The code uses CoOp's settings for ImageNet, SGD with a
    cosine schedule from 2e-3.
    """

    lr: float = 1e-3
    reduction: int = Field(
        4, ge=1, search=Choice((2, 4, 8, 16)), description="width of the feature divided by that of the bottleneck"
    )
    ratio: float = Field(
        0.2,
        ge=0,
        le=1,
        search=Linear(0.05, 1.0),
        description="weight of the adapter's output; the feature has 1 - ratio",
    )

    def build(self, backbone: Backbone) -> nn.Module:
        return _Mixed(backbone, self.reduction, self.ratio)

    def representation(
        self, module: "_Mixed", x: Tensor, classes: Tensor | None = None, client: ClientContext | None = None
    ) -> Tensor:
        return module.features(x)


class _Mixed(nn.Module):
    text: Tensor

    def __init__(self, backbone: Backbone, reduction: int, ratio: float) -> None:
        super().__init__()
        width = backbone.width
        narrow = max(1, width // reduction)
        down, up = nn.Linear(width, narrow, bias=False), nn.Linear(narrow, width, bias=False)
        self.adapter = nn.Sequential(down, nn.ReLU(), up, nn.ReLU())  # without biases, as in the published code
        self.register_buffer("text", backbone.class_embeddings, persistent=False)
        self.scale = backbone.logit_scale
        self.ratio = ratio

    def features(self, x: Tensor) -> Tensor:
        """(B, D) adapted, unit rows."""
        # The length of x cancels out, since ReLU and linear layers without bias scale with it.
        return normalize(self.ratio * self.adapter(x) + (1 - self.ratio) * x, dim=-1)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.scale * self.features(x) @ self.text.T
