"""A general prompt that is also a visual token, and tokens for each class, trained on a long tail (CAPT).

Source: Hou et al., CVPR 2025, arXiv 2503.06993; details as in a copy of the authors' code, 2373604131/clientLT, commit
24045d2 (federated_main.py, trainers/capt.py, loss/prompt_loss.py, clip/model.py, configs/trainers/CAPT/vit_b16.yaml).
Unread: the paper, beyond its abstract.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear, Log


@component
class CAPT(PromptMethod):
    """Defaults are those of the program: 4 tokens, of which 1 is general, and ViT-B/16's settings of training.

    Its server is `label_clusters`, which counts the rows of each class as clients send them. Their log shares are added
    to the logits in training, so that predictions are not drawn to frequent classes; without that server, classes count
    as equally frequent. 20 clients, of which 8 train in a round, and 10 rounds are set in the experiment, with
    `--partition long_tail --partition.alpha 0.05`.

    The loss is the cross-entropy of these logits; that of the cosines of an image with the mean token of each class,
    with the same log shares; and the entropy-like term of the code, by which the cosines with the general tokens become
    equal for all images of a batch.

    Differs: the code trains the clients of a round one after another on one model, which is not reset between them, and
    keeps the momentum; here all start from the server's model. It gives each client the counts of the whole train set;
    here they are those of the clients so far, and one row for each class. It masks gradients of absent classes after
    the step, where that has no effect; here nothing is masked. It crops and flips images at random, as `--augment`
    does.
    Differs: tokens and features must have one width to be compared, as in CLIP's published models. In others, CLIP's
    projection of text features is applied to the tokens first.
    """

    length: int = Field(4, search=Choice((4, 8, 16), when=("init", "")))
    general: int = Field(
        1, ge=1, search=Choice((1, 2, 3)), description="of the tokens, those that all classes and the image tower share"
    )
    general_weight: float = Field(
        1.0, ge=0, search=Linear(0.0, 2.0), description="weight of the term of the general tokens"
    )
    class_weight: float = Field(
        1.0, ge=0, search=Linear(0.0, 2.0), description="weight of the term of the classes' tokens"
    )
    temperature: float = Field(0.1, gt=0, search=Log(0.01, 1.0), description="of the cosines in both terms")

    reads_rule = True
    reads_client = True  # for `label_clusters`, which has clients send their rows by class

    @property
    def sites(self) -> tuple[Site, ...]:
        return "text_tokens", "visual_tokens"

    @property
    def contrasts_rows(self) -> bool:
        return self.general_weight > 0  # its term is over all images of a batch

    def build(self, backbone: Backbone) -> nn.Module:
        return _Dual(backbone, self)

    def loss(self, module: "_Dual", batch: Batch) -> Tensor:
        sent = batch.rule.sent if batch.rule else {}
        rows = sent.get("class_rows", torch.zeros_like(module.ends)).to(module.general.dtype) + 1
        shares = (rows / rows.sum()).log()
        images = module.images(batch.x)
        logits = module.logits(images, module.class_texts(batch.classes), batch.classes)
        general = normalize(images, dim=-1) @ module.unit(module.general).T / self.temperature
        # Each token of a class has unit length, but their mean has not.
        tokens = module.unit(module.class_aware).mean(dim=1)
        by_class = normalize(images, dim=-1) @ tokens.T / self.temperature
        if batch.classes is not None:
            by_class = by_class.masked_fill(~batch.classes, -torch.inf)
        loss = cross_entropy(logits + shares, batch.y)
        loss = loss + self.general_weight * (general.flatten().logsumexp(dim=0) - general.mean())
        return loss + self.class_weight * cross_entropy(by_class + shares, batch.y)


class _Dual(Prompted):
    def __init__(self, backbone: Backbone, method: CAPT) -> None:
        first = method.initial_tokens(backbone.text)
        super().__init__(backbone, len(first), flag := method.length_flag(len(first)))
        if method.general >= len(first):
            raise InputError(f"{flag} leaves no tokens for each class after --method.general {method.general}")
        self.image_tower = backbone.image
        self.general = nn.Parameter(first[: method.general])
        # (C, n, W)
        self.class_aware = nn.Parameter(
            torch.stack([method.initial_tokens(self.tower)[method.general :] for _ in backbone.classes])
        )
        self.projection = nn.Linear(self.tower.width, backbone.image.width)
        self.compared = backbone.width == self.tower.width

    def unit(self, tokens: Tensor) -> Tensor:
        """(..., W) tokens -> (..., D) unit rows."""
        return normalize(tokens if self.compared else self.tower.project(tokens), dim=-1)

    def images(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.image_tower.encode(x, insertions=Insertions(self.projection(self.general)[None]))

    def class_texts(self, classes: Tensor | None = None) -> Tensor:
        """(n, D) unit rows, the text features of the n active classes."""
        active = self.active(classes)
        start = torch.cat([self.names[0, :1], self.general])
        rests = torch.cat([self.class_aware[active], self.names[active][:, 1:]], dim=1)
        ends = self.ends[active] - 1 + self.class_aware.shape[1]
        return normalize(self.tower.encode_after(start, rests, ends), dim=-1)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 3, H, W) -> (B, C)
        return self.logits(self.images(x), self.class_texts(classes), classes)
