"""Methods: what is trained on top of the frozen CLIP, and how a client trains it.

A method's file says `build(backbone)`, which returns a module that holds exactly what is trained, and perhaps `sites`
(where that attaches to CLIP), `loss`, its closed-form `gradients`, and `scope` (what of it travels). The
hyperparameters of a client's training are fields of every method.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from fedsim.params import Params
from fedsim.registry import component
from fedsim.search import Choice, Field, Linear, Log
from fedsim.sites import Reads, Site, reads_of
from fedsim.towers import ImageTower, TextTower

# Who has a tensor: all clients the same one, trained by each and combined by the server; each client its own, which
# never leaves it; the server, which alone changes it, and sends it; or nobody changes it and it never travels, because
# it follows from the seed.
Scope = Literal["shared", "private", "server", "frozen"]


@dataclass(frozen=True)
class Backbone:
    """What a method sees of the frozen CLIP.

    Attributes:
        prototypes: (C, D) unit rows, the text feature of each class.
        logit_scale: exp of CLIP's temperature parameter.
        classes: the C class names.
        prompt: the text of a class, `{}` where its name goes.
        text_tower, image_tower: the towers that the method's sites ask for, and no other.
    """

    prototypes: Tensor
    logit_scale: float
    classes: tuple[str, ...] = ()
    prompt: str = "a picture of a {}"
    text_tower: TextTower | None = None
    image_tower: ImageTower | None = None

    @property
    def width(self) -> int:
        """D, the width of the shared embedding space."""
        return self.prototypes.shape[1]

    @property
    def text(self) -> TextTower:
        if self.text_tower is None:
            raise TypeError("a method that trains through the text tower says so: `text_tokens` among its sites")
        return self.text_tower

    @property
    def image(self) -> ImageTower:
        if self.image_tower is None:
            raise TypeError("a method that trains through the image tower says so: `image_blocks` among its sites")
        return self.image_tower


# Beside which optimizers a hyperparameter counts.
SGD = ("optimizer", "sgd")
ADAM = ("optimizer", "adam", "adamw")


@component
class Method(ABC):
    """What is trained, as hyperparameters. Subclasses are components; defaults are their paper's."""

    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="a client's optimizer")
    lr: float = Field(1e-3, gt=0, search=Log(1e-5, 1e-1), description="step size")
    momentum: float = Field(0.0, ge=0, lt=1, search=Linear(0.0, 0.95, when=SGD), description="of sgd")
    beta1: float = Field(0.9, ge=0, lt=1, search=Linear(0.5, 0.95, when=ADAM), description="of adam and adamw")
    # Values and no range: what counts is how far below 1 it is, in powers of ten.
    beta2: float = Field(
        0.999, ge=0, lt=1, search=Choice((0.9, 0.98, 0.99, 0.999), when=ADAM), description="of adam and adamw"
    )
    eps: float = Field(1e-8, gt=0, description="of adam and adamw")
    # 0 has no logarithm: a search tries little decay, and not none.
    weight_decay: float = Field(
        0.0, ge=0, search=Log(1e-6, 1e-1), description="coupled (L2) for adam and sgd, decoupled for adamw"
    )
    local_epochs: int = Field(1, ge=1, search=Linear(1, 5), description="passes over a client's train rows in a round")
    batch: int = Field(32, ge=1, search=Choice((16, 32, 64, 128)), description="rows of a local step")
    keep_moments: bool = Field(
        False, description="a client's optimizer goes on where its last round ended, in place of starting afresh"
    )

    min_batch: ClassVar[int] = 1  # a last batch of fewer rows is skipped

    label_space: Literal["all", "client"] = Field(
        "all", description="classes that compete in a client's loss: all that anybody trains on, or the client's own"
    )

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the parameters attach to CLIP; from this follows what is computed once and what at every step."""
        return ("image_feature",)

    @property
    def reads(self) -> Reads:
        """What a client is given of an image and of a class."""
        return reads_of(self.sites)

    @abstractmethod
    def build(self, backbone: Backbone) -> nn.Module:
        """A module x -> (B, C) logits whose state_dict is exactly what is trained, kept or sent.

        x is what `reads.image` says: (B, D) features, (B, T, D) patch tokens or (B, 3, H, W) bytes. Once built, the
        module is given a buffer `classes`, (C,) bool, the classes in question (of the client's loss, or of what is
        judged); the logits of all others are -inf whatever `forward` says of them.

        Raises:
            InputError: the hyperparameters do not fit the backbone.
        """

    def loss(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What a local step descends, in nats: x as in `build`, y (B,) classes -> scalar."""
        return cross_entropy(module(x), y)

    def gradients(self, module: nn.Module, params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
        """Losses of M clients at once, and their gradients: `loss` under autograd, or a closed form in its place.

        Args:
            module: what `build` returned, for its structure, and for all tensors that are not among `params`.
            params: tensors of its state_dict, and perhaps its `classes`; (M, *shape), or (*shape), where all clients
                have the same.
            x, y: (M, B, ...) inputs and (M, B) classes.

        Returns:
            (M,) losses in nats; and by name of each of the module's trained parameters, (M, *shape).
        """
        inside = _Objective(self, module)
        learned = {name: params[name] for name in trained(module)}
        fixed = {name: tensor for name, tensor in params.items() if name not in learned}
        shapes = {name: t.dim() for name, t in (*module.named_parameters(), *module.named_buffers())}
        stacked = [{n: 0 if v.dim() > shapes[n] else None for n, v in some.items()} for some in (learned, fixed)]

        def loss(learned: Params, fixed: Params, x: Tensor, y: Tensor) -> Tensor:
            return functional_call(inside, {f"module.{name}": v for name, v in (learned | fixed).items()}, (x, y))

        if not self.reads.towers:
            grads, losses = vmap(grad_and_value(loss), in_dims=(*stacked, 0, 0))(learned, fixed, x, y)
            return losses, grads
        # A step through a tower is large enough alone; and towers are not written for vmap.
        each = []
        for k in range(len(x)):
            mine = {n: (v if stacked[0][n] is None else v[k]).detach().requires_grad_() for n, v in learned.items()}
            rest = {n: v if stacked[1][n] is None else v[k] for n, v in fixed.items()}
            with torch.enable_grad():
                value = loss(mine, rest, x[k], y[k])
            grads = torch.autograd.grad(value, list(mine.values()), materialize_grads=True)
            each.append((value.detach(), *grads))
        losses, *grads = (
            torch.stack(some) if len(some) > 1 else some[0].unsqueeze(0) for some in zip(*each, strict=True)
        )
        return losses, dict(zip(learned, grads, strict=True))

    def steps(self, rows: int) -> int:
        """Local steps of a client with so many train rows in a round."""
        return self.local_epochs * (rows // self.batch + (rows % self.batch >= max(1, self.min_batch)))

    def scope(self, name: str) -> Scope:
        """Who has the tensor of this name; a server rule may decide otherwise."""
        return "shared"


def trained(module: nn.Module) -> list[str]:
    """Names of the parameters that a client trains."""
    return [name for name, tensor in module.named_parameters() if tensor.requires_grad]


class _Objective(nn.Module):
    """The loss as a module's forward, since `functional_call` swaps parameters for the length of one forward."""

    def __init__(self, method: Method, module: nn.Module) -> None:
        super().__init__()
        self.method, self.module = method, module

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.method.loss(self.module, x, y)
