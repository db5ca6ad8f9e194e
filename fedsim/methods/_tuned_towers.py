"""Base of methods that change the weights of CLIP's towers, or what passes through their blocks: logits and loss."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedsim.clip.insertions import Insertions
from fedsim.clip.memo import Memo
from fedsim.clip.sites import Site
from fedsim.clip.towers import ImageTower, TextTower
from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch
from fedsim.methods._contrast import Objective, contrastive
from fedsim.params import Params

Side = Literal["image", "text"]
Sides = Literal["both", "image", "text"]
MAX_COMPARED = 8 << 20  # bytes; to compare all weights of a tower takes as long as to encode the texts again


def sides(towers: Sides) -> tuple[Side, ...]:
    return ("image", "text") if towers == "both" else (towers,)


def blocks(towers: Sides) -> tuple[Site, ...]:
    sites: dict[Side, Site] = {"image": "image_blocks", "text": "text_blocks"}
    return tuple(sites[side] for side in sides(towers))


def tower_of(backbone: Backbone, side: Side) -> ImageTower | TextTower:
    return backbone.image if side == "image" else backbone.text


def module_key(name: str) -> str:
    """The name of a tower's weight as a key in a module, where dots are not allowed."""
    return name.replace(".", "/")


class TunedTowers(nn.Module):
    """CLIP with `weights` and `insertions` in one or both towers, which stay frozen, outside state_dict.

    Differs: batch norms keep the running statistics of the pretrained model, while code that puts all of CLIP in
    training mode updates them: they belong to the towers, which all clients of a process share.
    """

    tokens: Tensor  # (C, T), if the text tower is trained
    class_embeddings: Tensor  # (C, D), otherwise

    def __init__(self, backbone: Backbone, towers: Sides) -> None:
        super().__init__()
        self.sides = sides(towers)
        self.scale, self.memo = backbone.logit_scale, Memo(MAX_COMPARED)
        self.image_tower = backbone.image if "image" in self.sides else None
        self.text_tower = backbone.text if "text" in self.sides else None
        if self.text_tower:
            if not backbone.classes:
                raise InputError("training through the text tower needs the names of the classes; there are none")
            tokens = self.text_tower.tokenize(backbone.texts)
            self.register_buffer("tokens", tokens, persistent=False)
        else:
            self.register_buffer("class_embeddings", backbone.class_embeddings, persistent=False)

    def weights(self, side: Side) -> Params:
        """The tensors that replace a tower's frozen ones, by the tower's names."""
        return {}

    def insertions(self, side: Side) -> Insertions | None:
        """What is inserted into a tower."""
        return None

    def temperature(self) -> Tensor | float:
        """The factor by which cosines are multiplied."""
        return self.scale

    def texts(self, indices: Tensor | slice) -> Tensor:
        """(n, D) unit rows, the text features of the classes at these indices."""
        if not (tower := self.text_tower):
            return self.class_embeddings[indices]
        tokens = self.tokens[indices]

        def encode() -> Tensor:
            changes = self.weights("text"), self.insertions("text")
            return normalize(tower.encode(tokens, tower.ends(tokens), *changes), dim=-1)

        return self.memo(encode, tokens, *self.state_dict().values())

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, ...) -> (B, C)
        return among(self.score, x, classes) if self.text_tower else self.score(x, slice(None))

    def score(self, x: Tensor, indices: Tensor | slice) -> Tensor:
        """(B, n) logits of the classes at these indices; only their texts are encoded."""
        if self.image_tower:
            x = self.image_tower.encode(x, self.weights("image"), self.insertions("image"))
        return self.temperature() * normalize(x, dim=-1) @ self.texts(indices).T


def among(score: Callable[[Tensor, Tensor | slice], Tensor], x: Tensor, classes: Tensor | None) -> Tensor:
    """(B, ...) -> (B, C) logits by a `score`, which encodes the texts of active classes only; the others are masked."""
    if classes is None or classes.all():
        return score(x, slice(None))
    active = classes.nonzero().flatten()
    logits = score(x, active)
    return logits.new_full((len(logits), len(classes)), -torch.inf).index_copy(1, active, logits)


def objective(kind: Objective, module: TunedTowers, batch: Batch) -> Tensor:
    indices, targets = compared(kind, batch)
    return loss_of(kind, module.score(batch.x, indices), targets)


def compared(kind: Objective, batch: Batch) -> tuple[Tensor | slice, Tensor]:
    """The n classes that a loss compares, as indices, and (B,) the position of each row's class among them."""
    if kind == "contrastive":
        # Only the classes in the batch are encoded: texts dominate the cost of a step through the text tower.
        return batch.y.unique(return_inverse=True)
    if batch.classes is None:
        return slice(None), batch.y
    return batch.classes.nonzero().flatten(), (batch.classes.cumsum(dim=0) - 1)[batch.y]


def loss_of(kind: Objective, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of (B, n) logits of the classes that `compared` gives, and the targets that it gives, in nats."""
    return contrastive(logits, targets) if kind == "contrastive" else cross_entropy(logits, targets)
