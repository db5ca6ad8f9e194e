"""Linear probe on the image feature, initialized as zero-shot CLIP.

Source: linear probing as in Radford et al. 2021, arXiv 2103.00020; the initialization with text features is that
of WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903, in whose code (mlfoundations/wise-ft, commit 58b7a4b,
src/models/modeling.py) the head also has a bias. Its training hyperparameters are ours.
"""

from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.methods import Backbone, Method
from fedsim.registry import component


@component
class Probe(Method):
    """C x D weights without bias; logits are scaled cosines until training changes the length of a row."""

    def build(self, backbone: Backbone) -> nn.Module:
        return _Head(backbone)


class _Head(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.weight = nn.Parameter(backbone.class_embeddings.clone())
        self.scale = backbone.logit_scale

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.scale * normalize(x, dim=-1) @ self.weight.T
