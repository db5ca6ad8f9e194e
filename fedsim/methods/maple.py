"""Tokens in front of the first blocks of both towers, the visual ones projected from those of the text (MaPLe).

Source: Khattak et al. 2023, arXiv 2210.03117; details as in the authors' code,
muzairkhattak/multimodal-prompt-learning, commit 904dbd7. Averaged over clients, it is the baseline FedMaPLe of FedMVP,
arXiv 2504.20860, and of PLAN; FLIP, 0-ml/flip, commit ec3a848, has public code for that.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Schedule
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Choice, Field


@component
class MaPLe(PromptMethod):
    """Defaults are those of the authors' program, with one of its epochs in each round.

    The program is train.py with configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml. It initializes two tokens with
    the first two of "a photo of a" and leaves "of a" in front of the class name, so that training starts from "a photo
    of a cat."; here `init` and `words`. Of its five epochs, the first has a step size of 1e-5.

    FLIP has the same modules. Its program without flags, with `--prompt_algo MaPLe`, is `--method.init ""
    --method.words "" --method.length 4 --method.depth 1 --method.lr 5e-3 --method.schedule constant
    --method.weight-decay 1e-4 --method.batch-size 8`.

    Differs: the cosine starts at the full step size, without that first epoch. The program computes in half precision,
    and crops and flips images at random; here `--precision bf16` and `--augment` do.
    Unread: the values with which FedMVP and PLAN trained FedMaPLe.
    """

    lr: float = 3.5e-3
    schedule: Schedule = "cosine"
    batch_size: int = Field(4, search=Choice((4, 8, 16, 32)))
    length: int = Field(2, search=Choice((2, 4, 8), when=("init", "")))
    init: str = "a photo"
    words: str = Field("of a", description="constant text between the learned tokens and the class name")
    depth: int = Field(
        9,
        ge=1,
        search=Choice((1, 3, 6, 9, 12)),
        description="number of first blocks, each with its own tokens (all of the shorter tower, if it has fewer)",
    )

    @property
    def sites(self) -> tuple[Site, ...]:
        return "text_tokens", "visual_tokens"

    def build(self, backbone: Backbone) -> nn.Module:
        return _Coupled(backbone, self)


class _Coupled(Prompted):
    def __init__(self, backbone: Backbone, method: MaPLe) -> None:
        depth = min(method.depth, backbone.text.depth, backbone.image.depth)
        tokens = method.deep_tokens(backbone.text, depth)
        _, length, width = tokens.shape
        super().__init__(backbone, length, method.length_flag(length), method.words.strip())
        self.image_tower = backbone.image
        self.tokens = nn.Parameter(tokens)
        # As in the code, the projections of all blocks after the first start alike.
        shallow, deep = (nn.Linear(width, backbone.image.width) for _ in range(2))
        self.projections = nn.ModuleList([shallow, *(deepcopy(deep) for _ in range(depth - 1))])

    def visual_tokens(self) -> Tensor:
        """(d, L, W) with the width of the image tower."""
        return torch.stack([project(tokens) for project, tokens in zip(self.projections, self.tokens, strict=True)])

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 3, H, W) -> (B, C)
        features = self.image_tower.encode(x, insertions=Insertions(self.visual_tokens()))
        return self.logits(features, self.texts(self.tokens, classes), classes)
