"""What methods that change the weights of CLIP's towers have in common: the logits, and the loss."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedsim.clip.sites import Site
from fedsim.clip.towers import ImageTower, TextTower
from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch
from fedsim.methods._contrast import Objective, contrastive
from fedsim.params import Params

Side = Literal["image", "text"]
Sides = Literal["both", "image", "text"]


def sides(towers: Sides) -> tuple[Side, ...]:
    return ("image", "text") if towers == "both" else (towers,)


def blocks(towers: Sides) -> tuple[Site, ...]:
    of: dict[Side, Site] = {"image": "image_blocks", "text": "text_blocks"}
    return tuple(of[side] for side in sides(towers))


def tower_of(backbone: Backbone, side: Side) -> ImageTower | TextTower:
    return backbone.image if side == "image" else backbone.text


def held(name: str) -> str:
    """A tower's name of a weight as a module can hold it, whose own names have no dots."""
    return name.replace(".", "/")


class Through(nn.Module):
    """CLIP, the weights of some towers changed by `weights`. The tower objects themselves stay frozen and unowned.

    Differs: batch norms keep the running statistics of the pretrained model, where code that puts all of CLIP in
    training mode moves them: they are the tower's, which all clients of a process share.
    """

    tokens: Tensor  # (C, T), if the text tower is trained
    class_embeddings: Tensor  # (C, D), if it is not

    def __init__(self, backbone: Backbone, towers: Sides) -> None:
        super().__init__()
        self.sides = sides(towers)
        self.scale = backbone.logit_scale
        self.image_tower = backbone.image if "image" in self.sides else None
        self.text_tower = backbone.text if "text" in self.sides else None
        if self.text_tower:
            if not backbone.classes:
                raise InputError("to train through the text tower the names of the classes are wanted; there are none")
            tokens = self.text_tower.tokenize([backbone.prompt.format(name) for name in backbone.classes])
            self.register_buffer("tokens", tokens, persistent=False)
        else:
            self.register_buffer("class_embeddings", backbone.class_embeddings, persistent=False)

    def weights(self, side: Side) -> Params:
        """What takes the place of a tower's frozen tensors, by the tower's names."""
        raise NotImplementedError

    def temperature(self) -> Tensor | float:
        """What cosines are multiplied with."""
        return self.scale

    def texts(self, indices: Tensor | slice) -> Tensor:
        """(n, D) rows of some classes."""
        if not self.text_tower:
            return self.class_embeddings[indices]
        tokens = self.tokens[indices]
        return normalize(self.text_tower.encode(tokens, self.text_tower.ends(tokens), self.weights("text")), dim=-1)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, ...) -> (B, C)
        if not self.text_tower or classes is None or classes.all():
            return self.score(x, slice(None))
        # The texts of inactive classes need not go through the tower to be masked.
        active = classes.nonzero().flatten()
        logits = self.score(x, active)
        return logits.new_full((len(logits), len(classes)), -torch.inf).index_copy(1, active, logits)

    def score(self, x: Tensor, indices: Tensor | slice) -> Tensor:
        """(B, n) logits of some classes, for which alone the text tower then computes."""
        image = self.image_tower.encode(x, self.weights("image")) if self.image_tower else x
        return self.temperature() * normalize(image, dim=-1) @ self.texts(indices).T


def objective(kind: Objective, module: Through, batch: Batch) -> Tensor:
    if kind == "cross_entropy":
        return cross_entropy(module(batch.x, batch.classes), batch.y)
    # A batch shows few of the classes, and their texts are what a step of a text tower costs.
    present, own = batch.y.unique(return_inverse=True)
    return contrastive(module.score(batch.x, present), own)
