"""Deep visual prompts that learn to depend less on the group of each image, a sensitive attribute (FF-DVP).

Source: Zeng et al., Findings of ACL 2024, "Fair Federated Learning with Biased Vision-Language Models", pages
10002-10017; details as in the authors' code, huiminzeng/FF-DVP, commit 56a3523: src/train.py, src/client_utils.py,
src/core.py, and adapters.py, classifier.py and clip_model.py in src/model/clip_utils.
Unread: the paper, beyond its abstract; and the weights of both fairness terms, which the code has no defaults for.
"""

from math import log
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, normalize, one_hot

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.errors import InputError, counted
from fedsim.fields import Names
from fedsim.methods import Backbone, Batch, Method, Scope
from fedsim.methods._contrast import contrastive
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear, Log

Notion = Literal["equalized_odds", "demographic_parity"]
HIDDEN = 32  # units of each layer of the heads


def _with(*places: str) -> AfterValidator:
    """Refuses a text without each of these places."""

    def check(text: str) -> str:
        if missing := [place for place in places if text.count(place) != 1]:
            raise InputError(f"a text needs {' and '.join(missing)} once, not {text!r}")
        return text

    return AfterValidator(check)


@component
class FFDVP(Method):
    """Defaults are those of the authors' program, which has 4 rounds and weights clients equally.

    Images have learned tokens at the input and in front of half of the blocks, all through one linear layer. The texts
    are fixed; each names a group and a class. An image is predicted as the class of the nearest text of any group.

    The loss is CLIP's contrastive loss of images and texts, plus `balance` times the KL divergence of an image's shares
    among the texts of groups from equal ones, plus `head_weight` times what a head adds: its cross-entropy and
    `fairness` times the gap of its predictions between groups. That is the difference in the mean probability of a
    class, of the rows of each true class (`equalized_odds`, a sum over these) or of all rows (`demographic_parity`) in
    a batch: of the highest group and the lowest, for the class that has the largest. The head serves training only, and
    stays on the client. With `balance` and `head_weight` 0, these are deep visual prompts without it.

    Differs: in the code, the optimizer does not have the heads, which are averaged as they started. Here each client
    trains its own, following the abstract ("client-specific knowledge") and the README ("local classification heads").
    Differs: the code's heads read an image and the text of its true class, which would give away the answer to a head
    that is trained; here, the image and the text that is nearest to it.
    Differs: in the code's gap, a group without rows has the mean 0, and with `demographic_parity` probabilities below
    1/2 count as 0; here groups without rows are left out, and probabilities count as they are.
    Differs: the code has two groups and two classes, and texts such as "A photo of a female, and she is smiling."; the
    texts of groups are not normalized there, and the scale of their scores is 100.
    Differs: the code's tokens at the input come after the layer norm in front of the first block, here before it. In a
    round, it keeps the epoch that is best on a fifth of a client's rows, and it computes in half precision, as
    `--precision bf16` does.
    """

    lr: float = Field(1e-4, search=Log(1e-5, 1e-2))
    local_epochs: int = Field(10, search=Choice((1, 5, 10)))
    batch_size: int = Field(18, search=Choice((16, 18, 32, 64)))
    length: int = Field(20, ge=1, le=4096, search=Choice((5, 10, 20)), description="learned tokens next to the patches")
    prompt_width: int = Field(768, ge=1, le=65536, description="width of the tokens, before the linear layer")
    dropout: float = Field(
        0.5,
        ge=0,
        lt=1,
        search=Choice((0.0, 0.25, 0.5)),
        description="share of the tokens' numbers that are dropped out",
    )
    text: Annotated[str, _with("{group}", "{class}")] = Field(
        "A photo of a {group}, who is {class}.", description="the text of a group with a class"
    )
    group_text: Annotated[str, _with("{group}")] = Field("A photo of a {group}.", description="the text of a group")
    group_names: Names | None = Field(
        None, description="names of the groups in the texts, in their order in reports (default: those of the data set)"
    )
    balance: float = Field(
        1.0, ge=0, search=Log(0.01, 10.0), description="weight of the divergence from equal shares of groups; 0: none"
    )
    head_weight: float = Field(
        0.1, ge=0, search=Linear(0.0, 1.0), description="weight of the head's loss and of its gap between groups"
    )
    fairness: float = Field(
        1.0, ge=0, search=Log(0.01, 10.0), description="weight of the gap between groups in the head's part of the loss"
    )
    notion: Notion = Field("equalized_odds", description="of the gap: between rows of the same class, or between all")

    reads_group = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return "text_tokens", "visual_tokens"

    @property
    def contrasts_rows(self) -> bool:
        return True

    def build(self, backbone: Backbone) -> nn.Module:
        return _Fair(backbone, self)

    def loss(self, module: "_Fair", batch: Batch) -> Tensor:
        assert batch.group is not None, "reads_group"
        images = module.images(batch.x)
        pairs = module.scale * images @ module.pairs.flatten(0, 1).T  # (B, G * C)
        loss = contrastive(pairs, batch.group * module.pairs.shape[1] + batch.y)
        if self.balance:
            shares = (module.scale * images @ module.groups.T).log_softmax(dim=1)
            loss = loss - self.balance * (shares.mean(dim=1) + log(shares.shape[1])).mean()
        if self.head_weight:
            logits = module.predicted(images, pairs, batch.classes)
            between = gap(logits.softmax(dim=1), batch.y, batch.group, len(module.groups), self.notion)
            loss = loss + self.head_weight * (cross_entropy(logits, batch.y) + self.fairness * between)
        return loss

    def scope(self, name: str) -> Scope:
        return "private" if self.is_auxiliary(name) else "shared"

    def is_auxiliary(self, name: str) -> bool:
        return name.startswith("head.")


def gap(shares: Tensor, y: Tensor, group: Tensor, groups: int, notion: Notion = "equalized_odds") -> Tensor:
    """How far apart the predictions for groups are: (B, C) probabilities, (B,) classes and groups -> a scalar."""
    # (B, K, G) which rows belong to each condition (true classes, or one for all rows) and group.
    conditions = one_hot(y, shares.shape[1]) if notion == "equalized_odds" else torch.ones_like(y)[:, None]
    cells = (conditions[:, :, None] * one_hot(group, groups)[:, None]).to(shares)
    rows = cells.sum(dim=0)[:, :, None]
    means = torch.einsum("bkg,bc->kgc", cells, shares) / rows.clamp(min=1)
    highest = means.masked_fill(rows == 0, -torch.inf).amax(dim=1)
    lowest = means.masked_fill(rows == 0, torch.inf).amin(dim=1)
    return (highest - lowest).clamp(min=0).amax(dim=1).sum()  # 0 for a condition without rows


class _Fair(nn.Module):
    pairs: Tensor  # (G, C, D) unit rows, of G groups
    groups: Tensor  # (G, D) unit rows

    def __init__(self, backbone: Backbone, method: FFDVP) -> None:
        super().__init__()
        self.tower, self.scale, self.dropout = backbone.image, backbone.logit_scale, method.dropout
        blocks, width = min(1 + self.tower.depth // 2, self.tower.depth), self.tower.width
        self.tokens = nn.Parameter(torch.empty(blocks, method.length, method.prompt_width).uniform_(-5, 5))
        self.project = nn.Linear(method.prompt_width, width)
        nn.init.kaiming_normal_(self.project.weight, mode="fan_out")
        self.head = _Head(backbone.width, len(backbone.classes))
        names = method.group_names or backbone.groups
        if len(names) != len(backbone.groups):
            raise InputError(
                f"--method.group-names needs {counted(len(backbone.groups), 'name')}, for the groups "
                f"{', '.join(backbone.groups)}; got {', '.join(names)}"
            )
        pairs = [
            method.text.replace("{group}", group).replace("{class}", name)
            for group in names
            for name in backbone.classes
        ]
        groups = [method.group_text.replace("{group}", group) for group in names]
        encoded = _encoded(backbone, [*pairs, *groups])
        self.register_buffer("pairs", encoded[: len(pairs)].unflatten(0, (len(names), -1)), persistent=False)
        self.register_buffer("groups", encoded[len(pairs) :], persistent=False)

    def images(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) unit rows."""
        tokens = self.project(self.tokens)[:, None].expand(-1, len(x), -1, -1)
        insertions = Insertions(dropout(tokens, self.dropout, self.training))
        return normalize(self.tower.encode(x, insertions=insertions), dim=-1)

    def predicted(self, images: Tensor, pairs: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, D) unit rows and (B, G * C) logits of all texts -> (B, C) logits of the head."""
        by_class = pairs.detach().unflatten(1, self.pairs.shape[:2])
        if classes is not None:
            by_class = by_class.masked_fill(~classes, -torch.inf)
        logits = self.head(images, self.pairs.flatten(0, 1)[by_class.flatten(1).argmax(dim=1)])
        return logits if classes is None else logits.masked_fill(~classes, -torch.inf)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 3, H, W) -> (B, C)
        pairs = self.scale * self.images(x) @ self.pairs.flatten(0, 1).T
        return pairs.unflatten(1, self.pairs.shape[:2]).amax(dim=1)


class _Head(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, HIDDEN), nn.Linear(width, HIDDEN)
        self.hidden, self.out = nn.Linear(2 * HIDDEN, HIDDEN), nn.Linear(HIDDEN, classes)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:  # (B, D) each -> (B, C)
        both = torch.cat([self.image(images), self.text(texts)], dim=-1)
        return self.out(self.hidden(both).relu())


@torch.no_grad()
def _encoded(backbone: Backbone, texts: list[str]) -> Tensor:
    """n texts -> (n, D) unit rows."""
    tokens = backbone.text.tokenize(texts)
    return normalize(backbone.text.encode(tokens, backbone.text.ends(tokens)), dim=-1)
