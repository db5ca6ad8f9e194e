"""How a client trains, whatever the method: optimizer, step size by round, clipping, epochs and batches."""

import math
from typing import ClassVar, Literal

import torch

from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear, Log

Schedule = Literal["constant", "cosine", "exponential", "step"]
# The optimizers for which a hyperparameter is searched.
SGD = ("optimizer", "sgd")
ADAM = ("optimizer", "adam", "adamw")
SPSA = ("estimator", "spsa")


@component
class LocalTraining:
    """Hyperparameters of local training, which are fields of every method."""

    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="optimizer of local training")
    lr: float = Field(1e-3, gt=0, search=Log(1e-5, 1e-1), description="step size")
    schedule: Schedule = Field(
        "constant", search=Choice(("constant", "cosine")), description="step size by round, the same for all clients"
    )
    warmup_rounds: int = Field(0, ge=0, le=10**9, description="rounds over which the step size first rises to lr")
    lr_decay: float = Field(
        0.99, gt=0, le=1, description="factor of the step size: exponential per round, step per `decay_rounds`"
    )
    decay_rounds: int = Field(10, ge=1, le=10**9, description="rounds between two decays, for step")
    clip_norm: float | None = Field(
        None, gt=0, description="largest norm of a client's gradient at a local step (default: no limit)"
    )
    momentum: float = Field(0.0, ge=0, lt=1, search=Linear(0.0, 0.95, when=SGD), description="momentum of SGD")
    beta1: float = Field(
        0.9,
        ge=0,
        lt=1,
        search=Linear(0.5, 0.95, when=ADAM),
        description="decay rate of the first moment, for adam and adamw",
    )
    # Values instead of a range, since it acts through its distance from 1, in powers of ten.
    beta2: float = Field(
        0.999,
        ge=0,
        lt=1,
        search=Choice((0.9, 0.98, 0.99, 0.999), when=ADAM),
        description="decay rate of the second moment, for adam and adamw",
    )
    eps: float = Field(1e-8, gt=0, description="added to the denominator, for adam and adamw")
    # 0 has no logarithm, so a search tries small values but not 0.
    weight_decay: float = Field(
        0.0, ge=0, search=Log(1e-6, 1e-1), description="coupled (L2) for adam and sgd, decoupled for adamw"
    )
    local_epochs: int = Field(
        1, ge=1, le=10**9, search=Linear(1, 5), description="passes over a client's train rows per round"
    )
    batch_size: int = Field(32, ge=1, search=Choice((16, 32, 64, 128)), description="rows per local step")
    persist_optimizer: bool = Field(
        False, description="keep each client's optimizer state between rounds instead of resetting it"
    )
    estimator: Literal["autograd", "spsa"] = Field(
        "autograd", description="gradient of a local step: exact, or estimated from values of the loss alone (spsa)"
    )
    directions: int = Field(
        1, ge=1, le=10**6, search=Choice((1, 2, 4, 8), when=SPSA), description="random directions of an estimate"
    )
    perturbation: float = Field(
        1e-3,
        gt=0,
        search=Log(1e-4, 1e-1, when=SPSA),
        description="by how much a parameter is changed, up and down, for a direction's two values of the loss",
    )

    min_batch: ClassVar[int] = 1  # smaller last batches are skipped
    # Whether autograd's gradient of `loss` is not the slope of its values, because a part of it is detached, scaled or
    # projected; `estimator` spsa is then refused.
    changes_gradients: ClassVar[bool] = False

    @property
    def fixed_rounds(self) -> bool:
        """Whether rounds depend on how many there are in total, so that a run cannot be continued with more."""
        return self.schedule == "cosine"

    def lr_in(self, round: int, rounds: int) -> float:
        """The step size of a round, from 1 to `rounds`.

        With warm-up, round r has lr * r / (warmup_rounds + 1), and the schedule begins once that is lr: as torch's
        LinearLR followed by CosineAnnealingLR over the remaining rounds, ExponentialLR or StepLR.
        """
        if round <= self.warmup_rounds:
            return self.lr * round / (self.warmup_rounds + 1)
        done, total = round - self.warmup_rounds - 1, rounds - self.warmup_rounds
        if self.schedule == "cosine":  # (1 + cos(pi x)) / 2 without cancellation, so the last step sizes are not 0
            return self.lr * math.cos(math.pi / 2 * done / total) ** 2
        decays = {"constant": 0, "exponential": done, "step": done // self.decay_rounds}
        return self.lr * self.lr_decay ** decays[self.schedule]

    def clipped(self, grads: Params) -> Params:
        """The gradients of M clients, each client's scaled down to a norm of `clip_norm` if its norm is larger.

        For one client it is what `torch.nn.utils.clip_grad_norm_` does.

        Args:
            grads: (M, *shape), by name of each parameter, including what the server rule adds.
        """
        if self.clip_norm is None or not grads:
            return grads
        rows = [grad.reshape(len(grad), -1) for grad in grads.values()]
        norms = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows]).norm(dim=0)
        factors = (self.clip_norm / (norms + 1e-6)).clamp(max=1)
        return {name: grad * factors.view(-1, *[1] * (grad.dim() - 1)) for name, grad in grads.items()}

    def proximal(self, params: Params) -> Params:
        """What replaces parameters after each step of the optimizer, by a proximal step (default: nothing).

        Args:
            params: (M, *shape), by name, the shared and private parameters of M clients after the step, also those that
                `Method.learned` leaves out.
        """
        return {}

    def steps(self, rows: int) -> int:
        """Local steps per round of a client with this many train rows."""
        return self.local_epochs * (rows // self.batch_size + (rows % self.batch_size >= max(1, self.min_batch)))
