"""Methods: what is trained on top of the frozen CLIP, and how a client trains it.

A method defines `build(backbone)`, which returns a module that holds exactly what is trained, and optionally `sites`
(where that attaches to CLIP), `loss`, its `closed_form`, and `scope` (what of it travels). The hyperparameters of a
client's training are fields of every method.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.clip.sites import Reads, Site, reads_of
from fedsim.clip.towers import ImageTower, TextTower
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear, Log

# Who has a tensor: all clients the same one, trained by each and combined by the server; each client its own, which
# never leaves it; the server, which alone changes it, and sends it; or nobody changes it and it never travels, because
# it follows from the seed.
Scope = Literal["shared", "private", "server", "frozen"]


@dataclass(frozen=True)
class Backbone:
    """What a method sees of the frozen CLIP.

    Attributes:
        class_embeddings: (C, D) unit rows, the text feature of each class.
        logit_scale: exp of CLIP's temperature parameter.
        classes: the C class names.
        prompt: the text of a class, `{}` where its name goes.
        text_tower, image_tower: the towers that the method's sites ask for, and no other.
    """

    class_embeddings: Tensor
    logit_scale: float
    classes: tuple[str, ...] = ()
    prompt: str = "a picture of a {}"
    text_tower: TextTower | None = None
    image_tower: ImageTower | None = None

    @property
    def width(self) -> int:
        """D, the width of the shared embedding space."""
        return self.class_embeddings.shape[1]

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


class Batch(NamedTuple):
    """What a local step sees. Of a stack of M clients, every tensor has a leading M.

    Attributes:
        x: (B, ...) what the method reads of the images: features, patch tokens or pixels.
        y: (B,) their classes.
        classes: (C,) bool, the classes that compete; None: all.
    """

    x: Tensor
    y: Tensor
    classes: Tensor | None = None


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
    batch_size: int = Field(32, ge=1, search=Choice((16, 32, 64, 128)), description="rows of a local step")
    persist_optimizer: bool = Field(
        False, description="keep each client's optimizer state from round to round, instead of starting from zero"
    )

    min_batch: ClassVar[int] = 1  # a last batch of fewer rows is skipped
    # Whether the logit of a class depends on which others are active; evaluation then asks once for each label space.
    joint_classes: ClassVar[bool] = False

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
        """A module (x, classes) -> (B, C) logits whose state_dict is exactly what is trained, kept or sent.

        x is what `reads.image` says: (B, D) features, (B, T, D) patch tokens or (B, 3, H, W) bytes. classes are those
        of `Batch.classes`; a module may ignore them, since the engine sets the logits of inactive classes to -inf.

        Raises:
            InputError: the hyperparameters do not fit the backbone.
        """

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """What a local step minimises: a scalar, in nats."""
        return cross_entropy(module(batch.x, batch.classes), batch.y)

    def closed_form(self, module: nn.Module, params: Params, batch: Batch) -> tuple[Tensor, Params] | None:
        """Losses of M clients and their gradients without autograd; None (the default): `loss` under autograd.

        Args:
            module: what `build` returned, for its structure and for all tensors that are not among `params`.
            params: tensors of its state_dict, (M, *shape), or (*shape) where all clients have the same.
            batch: of M clients; every tensor has a leading M.

        Returns:
            (M,) losses in nats; and by name of each of the module's trained parameters, (M, *shape).
        """
        return None

    def steps(self, rows: int) -> int:
        """Local steps of a client with so many train rows in a round."""
        return self.local_epochs * (rows // self.batch_size + (rows % self.batch_size >= max(1, self.min_batch)))

    def scope(self, name: str) -> Scope:
        """Who has the tensor of this name; a server rule may decide otherwise."""
        return "shared"


def trained(module: nn.Module) -> list[str]:
    """Names of the parameters that a client trains."""
    return [name for name, tensor in module.named_parameters() if tensor.requires_grad]


def masked(module: nn.Module) -> nn.Module:
    """The module, with logits of -inf for inactive classes, whatever its `forward` returns for them."""
    module.register_forward_hook(_mask_inactive, with_kwargs=True)
    return module


def _mask_inactive(module: nn.Module, args: tuple, kwargs: dict[str, Tensor | None], logits: Tensor) -> Tensor:
    if len(args) + len(kwargs) < 2:
        raise TypeError("a method's module is called with the active classes: module(batch.x, batch.classes)")
    classes = args[1] if len(args) > 1 else kwargs["classes"]
    return logits if classes is None else logits.masked_fill(~classes, -torch.inf)
