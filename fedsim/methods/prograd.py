"""PromptFL whose gradient is projected where it conflicts with zero-shot CLIP (ProGrad).

Source: Zhu et al., ICCV 2023, arXiv 2205.14865; details as in the authors' code, BeierZhu/Prompt-align, commit 1b76203
(ProGrad.public/trainers/prograd.py, and `prograd_backward_and_update` in their copy of Dassl).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsim.methods import Batch, Schedule
from fedsim.methods.promptfl import PromptFL, _Prompt
from fedsim.registry import component
from fedsim.search_space import Field, Linear


@component
class ProGrad(PromptFL):
    """Defaults are those of the authors' script, with one of its epochs in each round.

    The script is scripts/prograd.sh with configs/trainers/ProGrad/rn50.yaml and 16 tokens. For 8 and 16 shots of three
    of its data sets, the README has a projection of 0.8.

    Differs: the program initializes the last tokens with the words of a template for each data set, and those before
    them with zeros; here 16 random tokens, or the words of `--method.init` alone. The cosine starts at the full step
    size, without the program's first epoch at 1e-5. Zero-shot CLIP is that of `--prompt`.
    Differs: FLIP (0-ml/flip, commit ec3a848) adds the divergence to the loss and projects nothing: it lacks what makes
    the method, so its defaults are not followed here.
    Unread: the paper, beyond its abstract.
    """

    lr: float = 2e-3
    schedule: Schedule = "cosine"
    local_epochs: int = 1
    projection: float = Field(
        1.0,
        ge=0,
        le=1,
        search=Linear(0.0, 1.0),
        description="share that is removed of a gradient's part against zero-shot CLIP; 0 is PromptFL",
    )

    changes_gradients = True

    def loss(self, module: _Prompt, batch: Batch) -> Tensor:
        """The cross-entropy, to which the divergence from zero-shot predictions adds nothing but its gradient.

        The texts are encoded twice, so that both gradients reach the tokens, in any engine and rule.
        """
        x, y, classes = batch.x, batch.y, batch.classes
        domain, general = _Aligned.apply(module.tokens, self.projection)
        zero_shot = module.zero_shot(x, classes).softmax(dim=1)
        divergence = cross_entropy(module.score(x, module.texts(general, classes)), zero_shot)  # up to a constant
        loss = cross_entropy(module.logits(x, module.texts(domain, classes), classes), y)
        return loss + (divergence - divergence.detach())


class _Aligned(torch.autograd.Function):
    """Two copies of a tensor, for the loss of the domain and the general one, whose gradients become one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, projection: float) -> tuple[Tensor, Tensor]:
        return tokens.clone(), tokens.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.projection = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        domain, general = grads
        return aligned(domain, general, ctx.projection), None


def aligned(domain: Tensor, general: Tensor, projection: float) -> Tensor:
    """The gradient of the domain's loss, without the given share of its part against the general gradient."""
    unit = general / general.norm().clamp_min(1e-12)  # the general gradient is 0 if a single class competes
    return domain - projection * (domain * unit).sum().clamp(max=0) * unit
