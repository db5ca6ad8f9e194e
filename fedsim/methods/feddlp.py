"""Two sets of low-rank pairs that teach each other: a small shared one, and a larger private one with gates (FedDLP).

Source: Nguyen et al. 2025, arXiv 2503.07552; details as in the authors' code, dphuongn/FedCLIP, commit 4c31126:
system/flcore/clients/clientsoradualhetero.py, optimizers/sparse_optimizer.py and trainmodel/clip_model.py. The gates
and their proximal steps are those of SoRA, Ding et al. 2023, arXiv 2311.11696.

Unread: the paper beyond its first page.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fedsim.methods import Backbone, Batch, ClientContext, Scope
from fedsim.methods._distillation import divergence
from fedsim.methods._tuned_towers import compared, loss_of
from fedsim.methods.lora import Lora, Modules, Paired
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear, Log

OWN, GATE = "own.", "own.gate."


@component
class FedDLP(Lora):
    """Clients are evaluated with the private set. Defaults are those of a script for the text tower.

    The script is scripts/d47/d47_gs_soradualheterot_sd_all_pfl.sh. Its 10 clients, 100 rounds, and averaging by rows
    are set in the experiment. A gate that reaches 0 prunes a direction of its pair.

    Differs: the code steps the private set, and then the shared one toward the logits of the private one after that
    step; here both step at once, each toward the logits of the other before it. The gates' first steps are adamw's, as
    those of the pairs; the code's divides by the square root of an uncorrected second moment plus eps.
    Differs: the code ignores its rank of private pairs, which is that of the shared ones, and zeroes what it has shrunk
    to less than `threshold` once more; here they have their rank, and the threshold is SoRA's.
    Differs: in the code AdamW persists over rounds, here `persist_optimizer`.
    """

    modules: Modules = "all"
    own_rank: int = Field(4, ge=1, search=Choice((4, 8, 16)), description="rank of each private pair")
    own_teacher: float = Field(
        10.0, ge=0, search=Log(0.1, 10.0), description="weight of the shared set as the teacher of the private one"
    )
    shared_teacher: float = Field(
        1.0, ge=0, search=Log(0.1, 10.0), description="weight of the private set as the teacher of the shared one"
    )
    temperature: float = Field(3.0, gt=0, search=Linear(1.0, 5.0), description="temperature of the distillation")
    threshold: float = Field(
        5e-5, ge=0, search=Log(1e-6, 1e-2), description="what every step takes off the size of each gate"
    )

    changes_gradients = True

    def build(self, backbone: Backbone) -> "_Dual":
        return _Dual(self, backbone)

    def loss(self, module: "_Dual", batch: Batch) -> Tensor:
        indices, targets = compared(self.objective, batch)
        shared, own = (pairs.score(batch.x, indices) for pairs in (module, module.own))
        losses = loss_of(self.objective, shared, targets) + loss_of(self.objective, own, targets)
        to_own, to_shared = self._divergence(own, shared, targets), self._divergence(shared, own, targets)
        return losses + self.own_teacher * to_own + self.shared_teacher * to_shared

    def _divergence(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """That of the predictions that `objective` compares: of one direction, or the mean of both."""
        if self.objective == "cross_entropy":
            return divergence(student, teacher.detach(), self.temperature)
        student, teacher = (logits[:, targets] for logits in (student, teacher.detach()))
        both = divergence(student, teacher, self.temperature) + divergence(student.T, teacher.T, self.temperature)
        return both / 2

    def logits(
        self, module: "_Dual", x: Tensor, classes: Tensor | None = None, client: ClientContext | None = None
    ) -> Tensor:
        return module.own(x, classes)

    def scope(self, name: str) -> Scope:
        return "private" if name.startswith(OWN) else "shared"

    def clipped(self, grads: Params) -> Params:
        """Each set on its own, and gates not at all."""
        gates = {name: grad for name, grad in grads.items() if name.startswith(GATE)}
        own = {name: grad for name, grad in grads.items() if name.startswith(OWN) and name not in gates}
        shared = {name: grad for name, grad in grads.items() if not name.startswith(OWN)}
        return super().clipped(shared) | super().clipped(own) | gates

    def proximal(self, params: Params) -> Params:
        return {
            name: tensor.sign() * (tensor.abs() - self.threshold).clamp(min=0)
            for name, tensor in params.items()
            if name.startswith(GATE)
        }


class _Dual(Paired):
    """The shared set, with the private one under `own.`."""

    def __init__(self, method: FedDLP, backbone: Backbone) -> None:
        super().__init__(method, backbone)
        self.own = _Gated(replace(method, rank=method.own_rank), backbone)


class _Gated(Paired):
    """Pairs whose product is up @ diag(gate) @ down."""

    def __init__(self, method: Lora, backbone: Backbone) -> None:
        super().__init__(method, backbone)
        self.gate = nn.ParameterDict(
            {key: nn.Parameter(torch.randn(*up.shape[:-2], up.shape[-1])) for key, up in self.up.items()}
        )

    def product(self, key: str) -> Tensor:
        return (self.up[key] * self.gate[key].unsqueeze(-2)) @ self.down[key]
