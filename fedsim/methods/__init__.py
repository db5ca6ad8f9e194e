"""Methods: what is trained on top of the frozen CLIP, and how a client trains it.

A method's file says `build(backbone)`, which returns a module that holds exactly what travels, and perhaps
`loss` and `is_shared`. The hyperparameters of a client's training are fields that every method has.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.registry import component


@dataclass(frozen=True)
class Backbone:
    """What a method sees of the frozen CLIP.

    Attributes:
        prototypes: (C, D) unit rows, the text feature of each class.
        logit_scale: exp of CLIP's temperature parameter.
    """

    prototypes: Tensor
    logit_scale: float

    @property
    def width(self) -> int:
        """D, the width of the shared embedding space."""
        return self.prototypes.shape[1]


@component
class Method(ABC):
    """What is trained, as hyperparameters. Subclasses are components; defaults are their paper's."""

    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="a client's optimizer; its state starts afresh every round"
    )
    lr: float = Field(1e-3, gt=0, description="step size")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    beta1: float = Field(0.9, ge=0, lt=1, description="of adam and adamw")
    beta2: float = Field(0.999, ge=0, lt=1, description="of adam and adamw")
    eps: float = Field(1e-8, gt=0, description="of adam and adamw")
    weight_decay: float = Field(0.0, ge=0, description="coupled (L2) for adam and sgd, decoupled for adamw")
    local_epochs: int = Field(1, ge=1, description="passes over a client's train rows in a round")
    batch: int = Field(32, ge=1, description="rows of a local step")

    min_batch: ClassVar[int] = 1  # a last batch of fewer rows is skipped

    @abstractmethod
    def build(self, backbone: Backbone) -> nn.Module:
        """A module (B, D) -> (B, C) logits whose state_dict is exactly what a client has of its own or sends."""

    def loss(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What a local step descends, in nats: x (B, D) image features, y (B,) classes -> scalar."""
        return cross_entropy(module(x), y)

    def is_shared(self, name: str) -> bool:
        """Whether the tensor of this name travels; one that does not stays with its client."""
        return True
