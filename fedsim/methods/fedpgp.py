"""FedPGP: tokens that all learn, plus a client's own correction of low rank, which a contrast tells apart.

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

    That is federated_main.py with configs/trainers/PLOT/vit_b16.yaml. Its 25 rounds and 10 clients, and averaging by
    rows, are the experiment's.

    The one script of their repository, scripts/plot_basetonew_base.sh, has other values: rank 8, contrast 0.5, two
    prompts, batches of as many rows as a class has shots.
    """

    local_epochs: int = 2
    rank: int = Field(4, ge=1, le=4096, search=Choice((1, 2, 4, 8)), description="of a client's correction")
    contrast: float = Field(1.0, ge=0, search=Log(0.01, 10.0), description="weight of the contrast")
    temperature: float = Field(0.5, gt=0, search=Log(0.05, 1.0), description="of the contrast")

    def build(self, backbone: Backbone) -> nn.Module:
        return _LowRank(backbone, self)

    def loss(self, module: "_LowRank", batch: Batch) -> Tensor:
        """The class loss; and class by class, the common text shall be nearer to the untrained than to the client's."""
        x, y, classes = batch
        common, own = module.texts(module.sigma, classes), module.texts(module.tokens(), classes)
        untrained = module.untrained[module.active(classes)]
        cosines = torch.stack([(untrained * common).sum(dim=-1), (common * own).sum(dim=-1)], dim=1)
        contrast = -(cosines / self.temperature).log_softmax(dim=1)[:, 0].mean()
        return cross_entropy(module.logits(x, own, classes), y) + self.contrast * contrast

    def scope(self, name: str) -> Scope:
        return "shared" if name == "sigma" else "private"


class _LowRank(Prompted):
    untrained: Tensor  # (C, D)

    def __init__(self, backbone: Backbone, method: FedPGP) -> None:
        tower, sigma = backbone.text, method.start(backbone.text)
        length = len(sigma)
        super().__init__(backbone, length, method.asked(length))
        self.sigma = nn.Parameter(sigma)
        self.u = nn.Parameter(torch.empty(length, method.rank).normal_(std=0.02))
        self.v = nn.Parameter(torch.empty(method.rank, tower.width).normal_(std=0.02))
        # What the code takes for CLIP's own text of a class is "X X X X cat.", and no sentence.
        placeholder = tower.embed(tower.tokenize([" ".join("X" * length)]))[0, 1:-1]
        with torch.no_grad():
            self.register_buffer("untrained", self.texts(placeholder), persistent=False)

    def tokens(self) -> Tensor:  # (L, W)
        return self.sigma + self.u @ self.v

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.logits(x, self.texts(self.tokens(), classes), classes)
