"""A gate on the image feature, and a loss that aligns clients' features with those of the target domain (FACMIC).

Source: Wu, Desrosiers and Chaddad, MICCAI 2024, arXiv 2410.14707; details as in the authors' code, AIPMLab/FACMIC,
commit 92c9a20. The discrepancy is the local maximum mean discrepancy (LMMD) of Zhu et al. 2020, arXiv 2106.06469.

Transductive: training reads the rows that the held-out domain is tested on, without their labels.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.methods import Backbone, Batch, Method
from fedsim.methods._batch_norm import BatchNorm
from fedsim.methods._contrast import contrastive
from fedsim.registry import component
from fedsim.search_space import Field, Log

KERNELS, GROWTH = 5, 2.0  # radial kernels, and the ratio of the bandwidths of two neighbours


@component
class FACMIC(Method):
    """Defaults are those of the authors' program, main.py.

    Its 50 rounds, averaging by rows (`--server.weighting rows`) and 80/10/10 split (`--train-share 0.8`) are set in the
    experiment. The running statistics of the gate's batch norm are averaged like its weights, as in the code.
    With `label_space` client, only the client's own classes are predicted for target rows, too.

    Differs: a local epoch is one pass over the train rows, with a short last batch. The code drops that, and on all of
    its data sets but one takes 199 batches of an endless loader instead. Its clients share one endless loader of target
    rows; here each client draws its own order in each round. The code reports the best round on test rows.
    """

    lr: float = Field(5e-5, search=Log(1e-5, 1e-2))
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = Field(0.02, search=Log(1e-5, 1.0))
    persist_optimizer: bool = True
    adaptation: float = Field(1.0, ge=0, search=Log(0.01, 10.0), description="weight of the discrepancy in the loss")

    min_batch: ClassVar[int] = 2  # a single image has nothing to contrast, and no variance
    reads_target = True
    changes_gradients = True

    def build(self, backbone: Backbone) -> nn.Module:
        return NormalizedGate(backbone)

    def loss(self, module: "NormalizedGate", batch: Batch) -> Tensor:
        assert batch.target is not None
        features = module.features(batch.x)
        with torch.no_grad():
            logits = module.logits(module.features(batch.target))
            if batch.classes is not None:
                logits = logits.masked_fill(~batch.classes, -torch.inf)
        # As in the code, gated features are compared with ungated ones.
        discrepancy = lmmd(features, normalize(batch.target, dim=-1), batch.y, logits.softmax(dim=1))
        return contrastive(module.logits(features), batch.y) + self.adaptation * discrepancy


def lmmd(source: Tensor, target: Tensor, y: Tensor, pseudo: Tensor) -> Tensor:
    """The squared distance of the two means in the kernels' space, class by class, and averaged over the classes.

    Only classes count that some source row has and that some target row most likely has; without any it is 0.

    Args:
        source, target: (S, D) and (T, D) unit rows.
        y: (S,) classes of the source rows.
        pseudo: (T, C) probabilities of the classes of the target rows, without gradients.
    """
    classes = torch.arange(pseudo.shape[1], device=y.device)
    labels, predicted = ((index.unsqueeze(1) == classes).to(pseudo.dtype) for index in (y, pseudo.argmax(dim=1)))
    both = (labels.sum(dim=0) > 0) & (predicted.sum(dim=0) > 0)
    shares = [rows / rows.sum(dim=0).clamp(min=torch.finfo(rows.dtype).tiny) * both for rows in (labels, pseudo)]
    weights = torch.cat([shares[0], -shares[1]])  # (S + T, C)
    rows = torch.cat([source, target])
    distances = (2 - 2 * rows @ rows.T).clamp(min=0)  # squared, of unit rows
    count = len(rows)
    mean = distances.detach().sum() / (count**2 - count)
    bandwidth = (mean / GROWTH ** (KERNELS // 2)).clamp(min=torch.finfo(rows.dtype).eps)
    kernels = sum((-distances / (bandwidth * GROWTH**k)).exp() for k in range(KERNELS))
    return (weights @ weights.T * kernels).sum() / both.sum().clamp(min=1)


class NormalizedGate(nn.Module):
    """FedCLIP's gate with a batch norm and a leaky ReLU in place of the tanh."""

    text: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        width = backbone.width
        layers = nn.Linear(width, width), BatchNorm(width), nn.LeakyReLU(), nn.Linear(width, width), nn.Softmax(dim=-1)
        self.attention = nn.Sequential(*layers)
        self.register_buffer("text", backbone.class_embeddings, persistent=False)
        self.scale = backbone.logit_scale

    def features(self, x: Tensor) -> Tensor:
        """(B, D) gated, unit rows."""
        return normalize(self.attention(x) * x, dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * features @ self.text.T

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.logits(self.features(x))
