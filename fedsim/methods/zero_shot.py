"""Zero-shot CLIP without training, the baseline of every run.

Source: Radford et al. 2021, arXiv 2103.00020.
"""

from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.methods import Backbone, Method
from fedsim.registry import component


@component
class ZeroShot(Method):
    """Predicts the class with the nearest class embedding."""

    def build(self, backbone: Backbone) -> nn.Module:
        return _Nearest(backbone)


class _Nearest(nn.Module):
    text: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.register_buffer("text", backbone.class_embeddings, persistent=False)
        self.scale = backbone.logit_scale

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.scale * normalize(x, dim=-1) @ self.text.T
