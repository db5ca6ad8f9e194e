"""FedCLIP's gate, trained against class texts to which each client adds residuals (Fed-MP).

Source: Zeng et al., Open-Vocabulary Federated Learning with Multimodal Prototyping, NAACL 2024, arXiv 2404.01232;
details as in the authors' code, huiminzeng/Fed-MP, commit 92c9d66: train.py, client_utils.py, nets/model.py.

Differs: prototypes at test time are left out. In the code, a confident image joins the mean of the class that it is
taken for, and changes the predictions of the images after it; here no prediction depends on other rows.
Differs: in the code, residuals start again from the same random values in each round; here clients keep their own.
Differs: the code adds residuals to text features before they are normalized; here texts have unit length, so the range
of the residuals, 5 in the code, is ours. It takes the residuals after a client's last step for its weight, here those
before it, and the gate of the local epoch that is best on validation rows, here the last one.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedsim.methods import Backbone, Batch, Scope
from fedsim.methods._contrast import contrastive
from fedsim.methods.fedclip import FedCLIP, Gated
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class FedMP(FedCLIP):
    """Predicts with the gate alone: residuals serve training. Defaults are those of the authors' program, train.py.

    Residuals stay on their clients, and start from the same random values. With server rule `likeness`, a client weighs
    as much as its class texts are like those of the new classes (`--new-classes`). With alpha 0 and another rule this
    is `fedclip`. The code's 2 rounds are set in the experiment.
    """

    local_epochs: int = 2
    batch_size: int = Field(18, search=Choice((18, 32, 64, 128)))
    alpha: float = Field(0.3, ge=0, search=Log(0.01, 10.0), description="factor of the residuals")
    spread: float = Field(0.5, ge=0, description="residuals start uniformly between -spread and spread")

    reads_client: ClassVar[bool] = True

    def build(self, backbone: Backbone) -> nn.Module:
        return _WithResiduals(backbone, self.alpha, self.spread)

    def loss(self, module: "_WithResiduals", batch: Batch) -> Tensor:
        texts = module.texts()
        if batch.client is not None and batch.classes is not None:
            module.like(texts, batch.client.counts > 0, batch.classes)
        logits = module.scale * module.features(batch.x) @ texts.T
        if self.objective == "contrastive":
            return contrastive(logits, batch.y)
        masked = logits if batch.classes is None else logits.masked_fill(~batch.classes, -torch.inf)
        return cross_entropy(masked, batch.y)

    def closed_form(self, module: nn.Module, params: Params, batch: Batch) -> None:
        return None  # FedCLIP's knows no residuals

    def scope(self, name: str) -> Scope:
        return "private" if name == "residual" else "shared"

    def is_auxiliary(self, name: str) -> bool:
        return name == "residual"


class _WithResiduals(Gated):
    likeness: Tensor  # (), what `like` has found at the last local step

    def __init__(self, backbone: Backbone, alpha: float, spread: float) -> None:
        super().__init__(backbone)
        self.residual = nn.Parameter(torch.empty_like(backbone.class_embeddings).uniform_(-spread, spread))
        self.register_buffer("likeness", torch.ones(()))
        self.alpha = alpha

    def texts(self) -> Tensor:
        """(C, D) unit rows, the class texts with residuals."""
        return normalize(self.text + self.alpha * self.residual, dim=-1)

    @torch.no_grad()
    def like(self, texts: Tensor, own: Tensor, classes: Tensor) -> None:
        """Writes the sum of the cosines of a new class's text with those of a client's classes, averaged over new ones.

        Args:
            texts: (C, D), with residuals.
            own: (C,) bool, the client's classes.
            classes: (C,) bool, the classes that compete, which are all but the new ones.
        """
        sums = (self.text @ texts.T * own).sum(dim=-1)  # (C,)
        self.likeness.copy_((sums * ~classes).sum() / (~classes).sum().clamp(min=1))
