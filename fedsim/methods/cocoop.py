"""A prompt to which a small network adds what it reads from each image (CoCoOp), averaged over clients.

Source: Zhou et al., CVPR 2022, arXiv 2203.05557; details as in the authors' code, KaiyangZhou/CoOp, commit ff61507
(trainers/cocoop.py). Federated in the code of FLIP, 0-ml/flip, commit ec3a848; tables call it FedCoCoOp.
"""

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import normalize

from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Schedule
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Choice, Field

MAX_TEXTS = 1 << 12  # encoded at once: those of all active classes, for each image of a block


@component
class CoCoOp(PromptMethod):
    """Defaults are those of the authors' program, with one of its epochs in each round.

    The program is train.py with configs/trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1.yaml, as in its scripts. Every
    image has texts of its own, so a batch of B images costs as much as B steps of PromptFL, and the memory of as many.

    FLIP has the same network, and batches of one image. Its program without flags, with `--prompt_algo CoCoOp`, is
    `--method.init "" --method.lr 5e-3 --method.schedule constant --method.weight-decay 1e-4`.

    Differs: the cosine starts at the full step size, without the program's first epoch at 1e-5. The program computes in
    half precision, and crops and flips images at random; here `--precision bf16` and `--augment` do.
    Unread: the paper, beyond its abstract.
    """

    lr: float = 2e-3
    schedule: Schedule = "cosine"
    batch_size: int = Field(1, search=Choice((1, 2, 4, 8)))
    length: int = 4
    init: str = "a photo of a"
    reduction: int = Field(
        16, ge=1, search=Choice((4, 8, 16, 32)), description="width of the image feature per hidden unit of the network"
    )

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("conditional_tokens",)

    def build(self, backbone: Backbone) -> nn.Module:
        return _Conditional(backbone, self)


class _Conditional(Prompted):
    def __init__(self, backbone: Backbone, method: CoCoOp) -> None:
        tokens = method.initial_tokens(backbone.text)
        super().__init__(backbone, len(tokens), method.length_flag(len(tokens)))
        self.tokens = nn.Parameter(tokens)
        hidden = max(1, backbone.width // method.reduction)
        self.network = nn.Sequential(
            nn.Linear(backbone.width, hidden), nn.ReLU(), nn.Linear(hidden, backbone.text.width)
        )

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        images = max(1, MAX_TEXTS // max(1, len(self.active(classes))))
        return self.spread(torch.cat([self._score(part, classes) for part in x.split(images)]), classes)

    def _score(self, x: Tensor, classes: Tensor | None) -> Tensor:  # (B, D) -> (B, n)
        if not len(x):
            return x.new_zeros(0, len(self.active(classes)))
        unit = normalize(x, dim=-1)
        tokens = self.tokens + self.network(unit)[:, None]  # (B, L, W)
        # The text tower takes images as it takes the clients of a stack: in one call.
        texts = vmap(lambda own: self.texts(own, classes))(tokens)  # (B, n, D)
        return self.scale * torch.einsum("bd,bnd->bn", unit, texts)
