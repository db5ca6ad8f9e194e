"""A shared linear head on image features that each client rotates for itself (FedOT).

Source: Kong, Yeom, Jeon and Kim, CVPR 2026, arXiv 2505.19888; arithmetic of the abstract and of a summary
(en.papernotes.org). No authors' code was found: not checked against code.

Unread: the paper's text. Training hyperparameters, and starts from zero-shot CLIP without a rotation, are ours.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.errors import InputError
from fedsim.methods import Backbone, Method, Scope
from fedsim.registry import component
from fedsim.search_space import Choice, Field


@component
class FedOT(Method):
    """Logits are scaled products of the head's rows with Q x / |x|. The head is averaged; Q never leaves its client.

    Q is orthogonal, because it is the Cayley transform (I + R)(I - R)^-1 of the skew-symmetric part R of a trained
    matrix. With blocks, it is block-diagonal: the paper's FedOT(+B). With as many blocks as the feature has numbers,
    nothing is left to rotate, and the method is `probe`.
    """

    blocks: int = Field(
        1, ge=1, search=Choice((1, 2, 4, 8)), description="blocks of the rotation, a divisor of the feature's width"
    )

    def build(self, backbone: Backbone) -> nn.Module:
        if backbone.width % self.blocks:
            raise InputError(
                f"--method.blocks must be a divisor of the {backbone.width} numbers of a feature, not {self.blocks}"
            )
        return _Rotated(backbone, self.blocks)

    def scope(self, name: str) -> Scope:
        return "private" if name == "rotation" else "shared"


class _Rotated(nn.Module):
    def __init__(self, backbone: Backbone, blocks: int) -> None:
        super().__init__()
        width = backbone.width // blocks
        self.weight = nn.Parameter(backbone.class_embeddings.clone())
        self.rotation = nn.Parameter(torch.zeros(blocks, width, width))  # Q is I
        self.scale = backbone.logit_scale

    def orthogonal(self) -> Tensor:
        """(blocks, W, W), the blocks of Q."""
        skew = (self.rotation - self.rotation.mT) / 2
        eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(eye - skew, eye + skew)  # the factors commute

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        parts = normalize(x, dim=-1).unflatten(-1, self.rotation.shape[:2])
        rotated = torch.einsum("kij,bkj->bki", self.orthogonal(), parts).flatten(1)
        return self.scale * rotated @ self.weight.T
