"""A shared prompt plus a private low-rank correction, with a contrastive term (FedPGP).

Source: Cui et al., ICML 2024, arXiv 2405.09771; details as in the authors' code, TianyuCuiOvO/FedPGP, commit d43045b.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.methods import Backbone, Batch, Scope
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class FedPGP(PromptMethod):
    """Defaults are those of the authors' program without flags.

    The program is federated_main.py with configs/trainers/PLOT/vit_b16.yaml. Its 25 rounds and 10 clients, and
    averaging by rows, are set in the experiment.

    The only script of their repository, scripts/plot_basetonew_base.sh, has other values: rank 8, contrast 0.5, two
    prompts, a batch size equal to the number of shots.
    """

    local_epochs: int = 2
    rank: int = Field(4, ge=1, le=4096, search=Choice((1, 2, 4, 8)), description="rank of the private correction")
    contrast: float = Field(1.0, ge=0, search=Log(0.01, 10.0), description="weight of the contrastive term")
    temperature: float = Field(0.5, gt=0, search=Log(0.05, 1.0), description="temperature of the contrastive term")

    def build(self, backbone: Backbone) -> nn.Module:
        return _LowRank(backbone, self)

    def loss(self, module: "_LowRank", batch: Batch) -> Tensor:
        """Cross-entropy, and a contrast that pulls shared texts toward the untrained ones and off the private ones."""
        x, y, classes = batch.x, batch.y, batch.classes
        shared, private = module.texts(module.sigma, classes), module.texts(module.tokens(), classes)
        untrained = module.untrained[module.active(classes)]
        cosines = torch.stack([(untrained * shared).sum(dim=-1), (shared * private).sum(dim=-1)], dim=1)
        contrast = -(cosines / self.temperature).log_softmax(dim=1)[:, 0].mean()
        return cross_entropy(module.logits(x, private, classes), y) + self.contrast * contrast

    def scope(self, name: str) -> Scope:
        return "shared" if name == "sigma" else "private"


class _LowRank(Prompted):
    untrained: Tensor  # (C, D)

    def __init__(self, backbone: Backbone, method: FedPGP) -> None:
        tower, sigma = backbone.text, method.initial_tokens(backbone.text)
        length = len(sigma)
        super().__init__(backbone, length, method.length_flag(length))
        self.sigma = nn.Parameter(sigma)
        self.u = nn.Parameter(torch.empty(length, method.rank).normal_(std=0.02))
        self.v = nn.Parameter(torch.empty(method.rank, tower.width).normal_(std=0.02))
        # As CLIP's text of a class, the code uses "X X X X cat." instead of a sentence.
        placeholder = tower.embed(tower.tokenize([" ".join("X" * length)]))[0, 1:-1]
        with torch.no_grad():
            self.register_buffer("untrained", self.texts(placeholder), persistent=False)

    def tokens(self) -> Tensor:  # (L, W)
        return self.sigma + self.u @ self.v

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.logits(x, self.texts(self.tokens(), classes), classes)
