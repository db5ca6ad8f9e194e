"""A network that generates prompt tokens from the active classes (FedTPG).

Source: Qiu et al., ICLR 2024, arXiv 2310.06123; details as in the authors' code, boschresearch/FedTPG, commit f141c29.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from fedsim.clip.sites import Site
from fedsim.errors import InputError
from fedsim.methods import Backbone, Method, Schedule
from fedsim.methods._prompt import Prompted
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class FedTPG(Method):
    """Defaults are those of the authors' program without flags.

    The program is Launch_FL.py with config/defaults.py and config/utils.py, as in its published log. Its 500 rounds and
    uniform averaging are set in the experiment.

    The step size follows a cosine over the rounds, from 3e-3 toward 0 (federated/utils.py). The code steps a client's
    scheduler in the rounds in which it trains: the same as here if all clients do, as in the log.

    Differs: the code's network reads bare class names, here the prompted ones: `--prompt {}` is as in the code.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    lr: float = Field(3e-3, search=Log(1e-4, 1e-1))
    schedule: Schedule = "cosine"
    momentum: float = 0.9
    weight_decay: float = 1e-5
    batch_size: int = Field(200, search=Choice((32, 64, 128, 200)))
    persist_optimizer: bool = True
    label_space: Literal["all", "client"] = "client"
    length: int = Field(
        4,
        ge=1,
        le=4096,
        search=Choice((2, 4, 8, 16)),
        description="generated tokens before the class name",
    )
    heads: int = Field(4, ge=1, description="heads of the attention to the class texts")

    joint_classes = True  # the tokens, and so every logit, depend on all active classes

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("text_tokens",)

    def build(self, backbone: Backbone) -> nn.Module:
        if (width := backbone.text.width) % self.heads:
            raise InputError(f"--method.heads must divide {width}, the text tower's width; {self.heads} does not")
        return _Generated(backbone, self)


class _Generated(Prompted):
    """The network has 4,206,080 parameters if the text tower and its features are 512 wide."""

    def __init__(self, backbone: Backbone, method: FedTPG) -> None:
        super().__init__(backbone, method.length, f"--method.length {method.length}")
        width, features = backbone.text.width, backbone.width
        self.query = nn.Parameter(torch.empty(method.length, width).normal_(std=0.02))
        self.norm_query, self.norm_texts = nn.LayerNorm(width), nn.LayerNorm(features)
        self.attention = nn.MultiheadAttention(width, method.heads, kdim=features, vdim=features)
        self.norm, self.widen = nn.LayerNorm(width), nn.Linear(width, 8 * width)
        self.narrow = nn.Linear(4 * width, width)

    def tokens(self, classes: Tensor | None = None) -> Tensor:
        """(L, W), from the texts of the active classes only."""
        texts = self.norm_texts(self.class_embeddings[self.active(classes)])
        # As in the code, there is no residual connection around the attention.
        attended, _ = self.attention(self.norm_query(self.query), texts, texts)
        value, gate = self.widen(self.norm(attended)).chunk(2, dim=-1)
        return attended + self.narrow(value * gelu(gate))

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.logits(x, self.texts(self.tokens(classes), classes), classes)
