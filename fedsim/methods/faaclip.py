"""FACMIC's gate, trained against a private classifier of source and target features (FAA-CLIP).

Source: Wu, Chaddad, Desrosiers, Daqqaq and Kateb 2025, arXiv 2503.05776; details as in the authors' code,
AIPMLab/FAA-CLIP, commit 2e16680. Reversed gradients are those of Ganin et al. 2016, arXiv 1505.07818.

Transductive: training reads the rows that the held-out domain is tested on, without their labels.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedsim.methods import Backbone, Batch, Method, Scope
from fedsim.methods._contrast import contrastive
from fedsim.methods.facmic import NormalizedGate
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class FAACLIP(Method):
    """Defaults are those of the authors' program, main.py.

    Its uniform averaging and 80/10/10 split (`--train-share 0.8`) are set in the experiment; its 2 rounds are a
    placeholder. The domain classifier, which the code calls discriminator, never leaves its client, and predictions
    do not need it.

    Differs: a local epoch is one pass over the train rows, with a short last batch. The code drops that, and on one of
    its data sets takes 200 batches of an endless loader instead. Its clients share one endless loader of target rows;
    here each client draws its own order in each round. Here all classifiers start alike, and are as wide as the
    feature; the code's are 512 wide. The code reports the best round on test rows.
    """

    lr: float = Field(5e-5, search=Log(1e-5, 1e-2))
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = Field(0.02, search=Log(1e-5, 1.0))
    persist_optimizer: bool = True
    adversary: float = Field(0.5, ge=0, search=Log(0.01, 10.0), description="weight of the adversarial loss")

    min_batch: ClassVar[int] = 2  # a single image has nothing to contrast, and no variance
    reads_target = True
    changes_gradients = True

    def build(self, backbone: Backbone) -> nn.Module:
        return _Adversarial(backbone)

    def loss(self, module: "_Adversarial", batch: Batch) -> Tensor:
        assert batch.target is not None
        features = module.features(batch.x)
        with torch.no_grad():
            target = module.features(batch.target)
        # These have the value of the features and the opposite of their gradient.
        opposed = 2 * features.detach() - features
        source_logits, target_logits = module.classifier(opposed), module.classifier(target)
        # In the code, source rows have the label 1, target rows 0.
        told_apart = (softplus(-source_logits).mean() + softplus(target_logits).mean()) / 2
        return contrastive(module.logits(features), batch.y) + self.adversary * told_apart

    def scope(self, name: str) -> Scope:
        return "private" if self.is_auxiliary(name) else "shared"

    def is_auxiliary(self, name: str) -> bool:
        return name.startswith("classifier.")


class _Adversarial(NormalizedGate):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        width = backbone.width
        # Never evaluated, so without running statistics.
        norms = (nn.BatchNorm1d(width, track_running_stats=False) for _ in range(2))
        hidden = [layer for norm in norms for layer in (nn.Linear(width, width), norm, nn.ReLU())]
        self.classifier = nn.Sequential(*hidden, nn.Linear(width, 1))
