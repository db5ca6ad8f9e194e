"""Visual tokens for all images, and then tokens for groups of images, each with a key that selects it (SGPT).

Source: Deng et al., CVPR 2024, arXiv 2310.18285; details as in the authors' code, ubc-tea/SGPT, commit 213c95b:
main_prompt.py, utils.py, models/vit_models_pr.py and train.sh.
Unread: the paper, beyond its abstract.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedsim.clip.insertions import Insertions, replaced
from fedsim.clip.sites import Site
from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch, Method
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class SGPT(Method):
    """Defaults are those of the authors' script for CIFAR-100, with its 10 classes per client; server `group_keys`.

    Each of the first blocks has a shared token, each of the following ones a token for every group; tokens stay in the
    sequence up to the last block. The query of an image is its feature from the frozen tower, with negative numbers set
    to 0. In evaluation, an image is of the group with the nearest key. In training, it is of the group with the least
    (1 - cosine) * (share + 5e-4), where share is that of a group among all selections of earlier rounds, so that groups
    fill; servers other than `group_keys` do not send it. The script's 60 rounds of 5 in 100 clients are set in the
    experiment.

    Rounds alternate: in odd ones clients train the shared tokens, without those of groups, in even ones the tokens and
    keys of groups. Evaluations always have both.

    The authors' README asks for queries in which the data are clustered.

    Differs: the code trains both in each round, one after the other, with 5 epochs each. With `local_epochs: 5`, two
    rounds here are one of the code, with an average in between.
    Differs: the code trains a linear head on the mean of the class token and those of groups, in a vision transformer
    that was trained on ImageNet. Here the image tower and the class texts are CLIP's, and features are read from the
    class token. A query is projected, as CLIP's features are.
    Differs: shared tokens start as random as those of groups. In the code they are zeros, at which a layer norm
    multiplies gradients by several hundred.
    Differs: clients of a round have the same shares. In the code, clients train in turn, and one has those that include
    the selections of the clients before it.
    Differs: for domains, the code reads queries after the sixth block and takes one group for a batch; here it is as
    for CIFAR-100.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    lr: float = Field(1e-2, search=Log(1e-3, 1.0))
    momentum: float = 0.9
    weight_decay: float = 1e-5
    local_epochs: int = 5
    batch_size: int = Field(40, search=Choice((32, 40, 64, 128)))
    shared_blocks: int = Field(
        4, ge=1, search=Choice((3, 4, 5)), description="number of first blocks, with a shared token"
    )
    group_blocks: int = Field(
        3,
        ge=1,
        search=Choice((1, 2, 3)),
        description="number of blocks after them, with tokens of groups (at least the last block of a shorter tower)",
    )
    groups: int = Field(20, ge=1, le=4096, search=Choice((4, 10, 20)), description="groups of images")
    pull: float = Field(
        1.0, ge=0, search=Log(0.01, 10.0), description="weight of the cosine of queries and the keys that they select"
    )

    reads_client = True
    reads_rule = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("visual_tokens",)

    def build(self, backbone: Backbone) -> nn.Module:
        return _Grouped(backbone, self)

    def loss(self, module: "_Grouped", batch: Batch) -> Tensor:
        if batch.client is not None and batch.client.round % 2:
            groups = batch.y.new_empty(len(batch.y), 0)
            return cross_entropy(module(batch.x, batch.classes, groups), batch.y)
        cosines = module.cosines(batch.x)
        groups = module.filling(cosines, batch.rule.sent.get("selections") if batch.rule else None)
        fit = cosines.gather(1, groups).mean()
        return cross_entropy(module(batch.x, batch.classes, groups), batch.y) - self.pull * fit

    def learned(self, names, round):
        return [name for name in names if name.endswith("common") == bool(round % 2)]


class _Grouped(nn.Module):
    class_embeddings: Tensor  # (C, D)
    counts: Tensor  # (G,)

    def __init__(self, backbone: Backbone, method: SGPT) -> None:
        super().__init__()
        self.tower, self.scale = backbone.image, backbone.logit_scale
        if (depth := self.tower.depth) < 2:
            raise InputError("sgpt has shared tokens and tokens of groups in different blocks, and this tower has one")
        blocks = min(method.shared_blocks + method.group_blocks, depth)
        first = min(method.shared_blocks, blocks - 1)
        width, patch = self.tower.width, self.tower.weights["conv1.weight"][0]
        bound = (6 / (patch.numel() + width)) ** 0.5
        self.common = nn.Parameter(torch.empty(first, width).uniform_(-bound, bound))
        self.grouped = nn.Parameter(torch.empty(blocks - first, method.groups, width).uniform_(-bound, bound))
        self.keys = nn.Parameter(nn.init.orthogonal_(torch.empty(method.groups, backbone.width)))
        self.values = 2 * method.directions if method.estimator == "spsa" else 1  # of the loss, in a step
        self.register_buffer("counts", torch.zeros(method.groups))  # of a client's selections in a round
        self.register_buffer("class_embeddings", backbone.class_embeddings, persistent=False)

    def cosines(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, G) of the queries of images with the keys."""
        with torch.no_grad():
            query = normalize(self.tower.encode(x).relu(), dim=-1)
        return query @ normalize(self.keys, dim=-1).T

    def filling(self, cosines: Tensor, selections: Tensor | None = None) -> Tensor:
        """(B, G) and (G,) earlier selections -> (B, 1) the groups of images in training, which are counted."""
        distances = 1 - cosines.detach()
        if selections is not None and selections.any():
            distances = distances * (selections / selections.sum() + 5e-4)
        groups = distances.argmin(dim=1, keepdim=True)
        if self.training:
            self.counts += torch.bincount(groups[:, 0], minlength=len(self.counts)) / self.values
        return groups

    def images(self, x: Tensor, groups: Tensor) -> Tensor:
        """(B, 3, H, W) and (B, k) groups of each image, k of which may be 0 -> (B, D)."""
        # The first token is added in front of the layer norm before the first block; each further one after a block.
        added = [*self.common[1:, None], *self.grouped[:, groups]]
        after = {index: partial(_append, tokens) for index, tokens in enumerate(added)}
        return self.tower.encode(x, insertions=Insertions(self.common[:1, None], after))

    def forward(self, x: Tensor, classes: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, C); by default, an image is of the group with the nearest key."""
        if groups is None:
            groups = self.cosines(x).argmax(dim=1, keepdim=True)
        return self.scale * normalize(self.images(x, groups), dim=-1) @ self.class_embeddings.T


def _append(tokens: Tensor, block: Any, x: Tensor, y: Tensor) -> Tensor:
    """(n, W) or (B, n, W) tokens after the others of a block's output."""
    return replaced(y, y.shape[1], tokens)
