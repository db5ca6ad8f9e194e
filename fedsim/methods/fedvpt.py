"""Learned tokens next to the patches of each image, with frozen class texts (VPT), averaged over clients.

Source: Jia et al. 2022, arXiv 2203.12119 (VPT); in CLIP and federated as in the code of Wang et al. 2025, arXiv
2505.23024, zhihaowang9/federated-prompt-learning-for-VLM, commit a1bf773. Tables of federated prompt methods call it
FedVPT, among them that of FedMVP, arXiv 2504.20860.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Method
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class FedVPT(Method):
    """Defaults are those of Wang et al.'s program with `--trainer VPT`.

    The program is code/federated_main.py with code/configs/datasets/cifar100.yaml. Its 10 clients, 50 rounds, and
    averaging by rows are set in the experiment. It inserts tokens at the input only (VPT-shallow), here `depth` 1; all
    blocks have their own in VPT-deep. In CLIP, the tokens at the input pass through the layer norm in front of the
    first block, as in this program and in that of MaPLe.

    Differs: the program computes in half precision, and crops and flips images at random; here `--precision bf16` and
    `--augment` do.
    Unread: the number of tokens of FedVPT in FedMVP's tables.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    lr: float = Field(1e-3, search=Log(1e-4, 1e-1))
    momentum: float = 0.9
    weight_decay: float = 5e-4
    length: int = Field(16, ge=1, le=4096, search=Choice((4, 8, 16)), description="learned tokens next to the patches")
    depth: int = Field(
        1,
        ge=1,
        search=Choice((1, 3, 6, 9, 12)),
        description="number of first blocks, each with its own tokens (all, if the tower has fewer)",
    )

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("visual_tokens",)

    def build(self, backbone: Backbone) -> nn.Module:
        return _Visual(backbone, self.length, self.depth)


class _Visual(nn.Module):
    class_embeddings: Tensor  # (C, D)

    def __init__(self, backbone: Backbone, length: int, depth: int) -> None:
        super().__init__()
        self.tower, self.scale = backbone.image, backbone.logit_scale
        blocks = min(depth, self.tower.depth)
        self.tokens = nn.Parameter(torch.empty(blocks, length, self.tower.width).normal_(std=0.02))
        self.register_buffer("class_embeddings", backbone.class_embeddings, persistent=False)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 3, H, W) -> (B, C)
        features = self.tower.encode(x, insertions=Insertions(self.tokens))
        return self.scale * normalize(features, dim=-1) @ self.class_embeddings.T
