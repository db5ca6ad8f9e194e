"""A shared adapter in each block, and a teacher of a private one and a copy of the received one (FedDAT).

Source: Chen et al. 2024, AAAI, arXiv 2308.12305; details as in the authors' code, HaokunChen245/FedDAT, commit 8ed970a:
src/modeling/models/adapter.py, src/train/visionlanguage_tasks/task_trainer.py and src/train/main.py.

Unread: the paper.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch, Method, Scope
from fedsim.methods._adapters import Bottleneck, added
from fedsim.methods._calls import with_tensors
from fedsim.methods._distillation import divergence
from fedsim.methods._tuned_towers import Side, Sides, TunedTowers, compared, sides, tower_of
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear, Log

SHARED = "shared."


@component
class FedDAT(Method):
    """Clients are evaluated with their teachers. Defaults are those of the code's script for ViLT, but for its batches.

    The shared adapter learns from the labels and from the teacher, and the private one, within the teacher, from the
    labels and from the shared one. The code takes one step of AdamW after the other for each batch; as both have
    parameters of their own, and the second reads the shared adapter's logits from before the first, one step of the sum
    of the losses is both. The script, src/train_vilt.sh, also sets 30 rounds; clients weigh the same in the mean.

    Differs: the code answers questions with one transformer over images and texts, and a head for each task, which
    stays on the client; here there are adapters in CLIP's towers, and no head. Weight decay acts on biases too.
    Differs: the code's step size rises and falls within a round, twice per batch; here it is `schedule`.
    Differs: in an evaluation, the code's teachers have the shared adapter that each client received last; here they
    have the new one. It also reports the accuracies of both adapters alone.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = Field(1e-4, search=Log(1e-5, 1e-2))
    beta2: float = 0.98
    weight_decay: float = 0.01
    towers: Sides = Field("both", description="towers that get adapters")
    reduction: int = Field(
        16, ge=1, search=Choice((4, 8, 16, 32)), description="width of a tower per unit of width of its adapters"
    )
    temperature: float = Field(3.0, gt=0, search=Linear(1.0, 5.0), description="temperature of the distillation")

    reads_rule = True
    changes_gradients = True

    @property
    def sites(self) -> tuple[Site, ...]:
        sites: dict[Side, Site] = {"image": "image_adapters", "text": "text_adapters"}
        return tuple(sites[side] for side in sides(self.towers))

    def build(self, backbone: Backbone) -> "_Teacher":
        return _Teacher(backbone, self)

    def loss(self, module: "_Teacher", batch: Batch) -> Tensor:
        indices, targets = compared("cross_entropy", batch)
        received = batch.rule.received if batch.rule else {}  # rules make tensors private, which are not received
        copy = {n: received.get(n, tensor).detach() for n, tensor in module.named_parameters() if n.startswith(SHARED)}
        shared = module.shared.score(batch.x, indices)
        teacher = with_tensors(_Teacher.score, module, copy, batch.x, indices)
        learning = cross_entropy(shared, targets) + divergence(shared, teacher.detach(), self.temperature)
        teaching = cross_entropy(teacher, targets) + divergence(teacher, shared.detach(), self.temperature)
        return (learning + teaching) / 2

    def clipped(self, grads: Params) -> Params:
        """Each adapter on its own, as it has a step of its own."""
        shared = {name: grad for name, grad in grads.items() if name.startswith(SHARED)}
        return super().clipped(shared) | super().clipped({n: g for n, g in grads.items() if n not in shared})

    def scope(self, name: str) -> Scope:
        return "shared" if name.startswith(SHARED) else "private"


class _Shared(TunedTowers):
    """CLIP with the shared adapters alone."""

    def __init__(self, backbone: Backbone, method: FedDAT) -> None:
        super().__init__(backbone, method.towers)
        self.adapters = _adapters(backbone, method)

    def insertions(self, side: Side) -> Insertions:
        return added(self.adapters[side].children())


class _Teacher(TunedTowers):
    """CLIP with the mean of the shared and the private adapters."""

    def __init__(self, backbone: Backbone, method: FedDAT) -> None:
        super().__init__(backbone, method.towers)
        self.shared, self.own = _Shared(backbone, method), _adapters(backbone, method)

    def insertions(self, side: Side) -> Insertions:
        pairs = zip(self.shared.adapters[side].children(), self.own[side].children(), strict=True)
        return Insertions(
            after={k: lambda _, x, y, p=pair: y + (p[0](y) + p[1](y)) / 2 for k, pair in enumerate(pairs)}
        )


class _Adapter(Bottleneck):
    def __init__(self, width: int, narrow: int) -> None:
        super().__init__(width, narrow, relu)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


def _adapters(backbone: Backbone, method: FedDAT) -> nn.ModuleDict:
    """One for each block of each tower.

    Raises:
        InputError: a tower is narrower than `reduction`.
    """
    towers = {side: tower_of(backbone, side) for side in sides(method.towers)}
    if narrow := [f"{side} tower: {tower.width}" for side, tower in towers.items() if tower.width < method.reduction]:
        raise InputError(f"feddat.reduction {method.reduction} is more than the width of a tower ({', '.join(narrow)})")
    lists = {s: [_Adapter(t.width, t.width // method.reduction) for _ in range(t.depth)] for s, t in towers.items()}
    return nn.ModuleDict({side: nn.ModuleList(adapters) for side, adapters in lists.items()})
