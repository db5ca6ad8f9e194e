"""Full fine-tuning of one or both towers, the baseline for small adapters.

Source: FedAvg and FedProx "with CLIP" in Lu, Hu, Wang and Xie 2023, arXiv 2302.13485 (FedCLIP). The class weights
initialized with the text features are those of WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903.
"""

from math import log
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.clip.sites import Site
from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch, Method
from fedsim.methods._tuned_towers import Objective, Side, Sides, TunedTowers, blocks, module_key, objective, tower_of
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class Finetune(Method):
    """Adam's values, the step size among them, and the loss are those of FedCLIP's adapter in its authors' code.

    Their code does not have this baseline, and we have not read the paper's values: not checked against code. With real
    CLIP a step of 5e-5 may be too large: an open issue, microsoft/PersonalizedFL #40, reports low accuracy with it.
    """

    # The range is lower than an adapter's: large steps would destroy the pretrained weights.
    lr: float = Field(5e-5, search=Log(1e-6, 3e-4))
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = Field(0.2, search=Log(1e-5, 1.0))
    objective: Objective = Field(
        "contrastive", description="CLIP's loss over the texts of the batch, or cross-entropy over all classes"
    )
    towers: Sides = Field("both", description="towers to train")
    head: bool = Field(False, description="train class weights in place of the text tower; needs towers: image")

    min_batch: ClassVar[int] = 2  # a single image has nothing to contrast

    def __post_init__(self) -> None:
        if self.head and self.towers != "image":
            raise InputError(f"finetune.head replaces the text tower and needs towers: image, not {self.towers!r}")

    @property
    def contrasts_rows(self) -> bool:
        return self.objective == "contrastive"

    @property
    def sites(self) -> tuple[Site, ...]:
        return (*blocks(self.towers), "head") if self.head else blocks(self.towers)

    def build(self, backbone: Backbone) -> nn.Module:
        return _Whole(backbone, self.towers, self.head)

    def loss(self, module: TunedTowers, batch: Batch) -> Tensor:
        return objective(self.objective, module, batch)


class _Whole(TunedTowers):
    """Holds a copy of every weight of the trained towers, under `image.` and `text.`."""

    def __init__(self, backbone: Backbone, towers: Sides, head: bool) -> None:
        super().__init__(backbone, towers)
        for side in self.sides:
            weights = {module_key(name): _copy(weight) for name, weight in tower_of(backbone, side).weights.items()}
            self.add_module(side, nn.ParameterDict(weights))
        if self.text_tower:
            # As in CLIP, the parameter is the logarithm.
            self.logit_scale = nn.Parameter(torch.tensor(log(backbone.logit_scale)).to(backbone.class_embeddings))
        self.head = _copy(backbone.class_embeddings) if head else None

    def weights(self, side: Side) -> Params:
        weights: Any = self.get_submodule(side)
        return {name.replace("/", "."): weight for name, weight in weights.items()}

    def temperature(self) -> Tensor | float:
        return self.logit_scale.exp() if self.text_tower else self.scale

    def texts(self, indices: Tensor | slice) -> Tensor:
        return super().texts(indices) if self.head is None else self.head[indices]


def _copy(weight: Tensor) -> nn.Parameter:
    # Convolution weights are stored channels last, which the fused optimizers would misread: they walk raw memory.
    return nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
