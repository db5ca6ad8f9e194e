"""Attention adapter that gates the image feature; only the adapter is trained and sent (FedCLIP).

Source: Lu, Hu, Wang and Xie 2023, arXiv 2302.13485; details as in the authors' code, microsoft/PersonalizedFL,
folder fedclip, commit 441670e.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedsim.methods import Backbone, Batch, ClientContext, Method
from fedsim.methods._contrast import Objective, contrastive
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class FedCLIP(Method):
    """Defaults are those of the authors' program as run by its readme.

    The program is methods/fed_at_clip.py. The readme's 200 rounds (the program's default is 300) and the program's
    uniform averaging are set in the experiment.

    Differs: the code trains with all of CLIP in training mode. The batch norms of a ResNet then normalise by the batch,
    and the running statistics of each client change and are not averaged; here features are those of the pretrained
    model. With a ViT there is no difference.
    """

    lr: float = Field(5e-5, search=Log(1e-5, 1e-2))
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = Field(0.2, search=Log(1e-5, 1.0))
    objective: Objective = Field(
        "contrastive", description="CLIP's loss over the texts of the batch, or cross-entropy over all classes"
    )

    min_batch: ClassVar[int] = 2  # a single image has nothing to contrast; the code skips it

    @property
    def contrasts_rows(self) -> bool:
        return self.objective == "contrastive"

    def build(self, backbone: Backbone) -> nn.Module:
        return Gated(backbone)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        logits = module(batch.x, batch.classes)
        return cross_entropy(logits, batch.y) if self.objective == "cross_entropy" else contrastive(logits, batch.y)

    def representation(
        self, module: "Gated", x: Tensor, classes: Tensor | None = None, client: ClientContext | None = None
    ) -> Tensor:
        return module.features(x)

    def closed_form(self, module: "Gated", params: Params, batch: Batch) -> tuple[Tensor, Params] | None:
        """Five matrix products per step, without a graph; None if some logits are masked."""
        x, y, classes = batch.x, batch.y, batch.classes
        if self.objective == "cross_entropy" and classes is not None:
            return None
        w1, b1, w2, b2 = (params[f"attention.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
        hidden = (x @ w1.mT).add_(b1.unsqueeze(-2)).tanh_()
        gate = (hidden @ w2.mT).add_(b2.unsqueeze(-2)).softmax(dim=-1)
        gated = gate * x
        norm = torch.linalg.vector_norm(gated, dim=-1, keepdim=True).clamp_min_(1e-12)  # as in `normalize`
        unit = gated.div_(norm)

        texts = module.text[y] if self.objective == "contrastive" else module.text
        logits = (unit @ texts.mT).mul_(module.scale)
        losses, grad_logits = (_contrast if self.objective == "contrastive" else _classify)(logits, y)

        grad_unit = (grad_logits @ texts).mul_(module.scale)
        # Only the component orthogonal to the unit feature changes it.
        grad_gated = grad_unit.addcmul_(unit, (grad_unit * unit).sum(dim=-1, keepdim=True), value=-1).div_(norm)
        grad_gate = grad_gated.mul_(x)
        grad_out = grad_gate.sub_((grad_gate * gate).sum(dim=-1, keepdim=True)).mul_(gate)
        grad_hidden = (grad_out @ w2).mul_(1 - hidden.square())
        grads = {
            "attention.0.weight": grad_hidden.mT @ x,
            "attention.0.bias": grad_hidden.sum(dim=-2),
            "attention.2.weight": grad_out.mT @ hidden,
            "attention.2.bias": grad_out.sum(dim=-2),
        }
        return losses, grads


def _contrast(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) losses of (M, B, B) logits, where text j belongs to image j, and their derivative by the logits."""
    by_text, by_image = logits.log_softmax(dim=-1), logits.log_softmax(dim=-2)
    losses = (by_text.diagonal(0, -2, -1) + by_image.diagonal(0, -2, -1)).mean(dim=-1) / -2
    grad_logits = by_text.exp_().add_(by_image.exp_())
    grad_logits.diagonal(0, -2, -1).sub_(2)
    return losses, grad_logits.div_(2 * y.shape[-1])


def _classify(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) losses of (M, B, C) logits for the cross-entropy over classes, and their derivative by the logits."""
    logs, targets = logits.log_softmax(dim=-1), y.unsqueeze(-1)
    losses = logs.gather(-1, targets).squeeze(-1).mean(dim=-1).neg()
    grad_logits = logs.exp_()
    grad_logits.scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=grad_logits.dtype))
    return losses, grad_logits.div_(y.shape[-1])


class Gated(nn.Module):
    """Multiplies the feature by softmax attention over its D dimensions, before it is normalised."""

    text: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        width = backbone.width
        self.attention = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Softmax(dim=-1))
        self.register_buffer("text", backbone.class_embeddings, persistent=False)
        self.scale = backbone.logit_scale

    def features(self, x: Tensor) -> Tensor:
        """(B, D) gated, unit rows."""
        return normalize(self.attention(x) * x, dim=-1)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.scale * self.features(x) @ self.text.T
