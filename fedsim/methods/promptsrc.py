"""Independent tokens in the first blocks of both towers, held near frozen CLIP in features and predictions (PromptSRC).

Source: Khattak et al., ICCV 2023, arXiv 2307.06948; details as in the authors' code, muzairkhattak/PromptSRC, commit
bb95c77 (trainers/promptsrc.py). Federated in the code of FLIP, 0-ml/flip, commit ec3a848.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, l1_loss, normalize

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.methods import Backbone, Batch, Schedule
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear


@component
class PromptSRC(PromptMethod):
    """Defaults are those of the authors' program for base-to-new, with one of its epochs in each round.

    The program is train.py with configs/trainers/PromptSRC/vit_b16_c2_ep20_batch4_4+4ctx.yaml. Without the three pulls,
    this is IVLP, independent prompts in vision and language, which tables of federated methods call FedVLP.

    Two of its parts are elsewhere: the average of the prompts over epochs, weighted by a Gaussian, is one over rounds
    (`--server moving_average --server.average gaussian`, with the program's 15th epoch and deviation of 1); and the
    frozen texts are those of `--prompt`, of which the program averages 60 templates (`--prompt openai80` has 80).

    Differs: of several templates, normalized features are averaged, as CLIP does; the program normalizes the mean only.
    The cosine starts at the full step size, without the program's first epoch at 1e-5. The program computes in half
    precision, and crops and flips images at random; here `--precision bf16` and `--augment` do.
    Differs: FLIP trains tokens at the input of the text alone, so its image features and their pull never change.
    Unread: the paper, beyond its abstract.
    """

    lr: float = 2.5e-3
    schedule: Schedule = "cosine"
    batch_size: int = Field(4, search=Choice((4, 8, 16, 32)))
    length: int = 4
    init: str = "a photo of a"
    visual_length: int = Field(
        4, ge=1, le=4096, search=Choice((4, 8, 16)), description="learned tokens next to patches"
    )
    depth: int = Field(
        9,
        ge=1,
        search=Choice((1, 3, 6, 9, 12)),
        description="number of first blocks of each tower, each with its own tokens (all, if a tower has fewer)",
    )
    text_pull: float = Field(
        25.0, ge=0, search=Linear(0.0, 50.0), description="weight of the mean absolute difference from frozen texts"
    )
    image_pull: float = Field(
        10.0, ge=0, search=Linear(0.0, 50.0), description="weight of the mean absolute difference from frozen images"
    )
    logit_pull: float = Field(
        1.0, ge=0, search=Linear(0.0, 5.0), description="weight of the divergence from zero-shot predictions, per class"
    )

    @property
    def sites(self) -> tuple[Site, ...]:
        return "text_tokens", "visual_tokens"

    def build(self, backbone: Backbone) -> nn.Module:
        return _Independent(backbone, self)

    def loss(self, module: "_Independent", batch: Batch) -> Tensor:
        images, texts = module.images(batch.x), module.texts(module.textual, batch.classes)
        with torch.no_grad():
            frozen = normalize(module.image_tower.encode(batch.x), dim=-1)
            written = module.class_embeddings[module.active(batch.classes)]
            zero_shot = module.score(frozen, written).log_softmax(dim=1)
        learned = module.score(images, texts).log_softmax(dim=1)
        loss = cross_entropy(module.logits(images, texts, batch.classes), batch.y)
        loss = loss + self.text_pull * l1_loss(texts, written) + self.image_pull * l1_loss(images, frozen)
        # Over images and classes, as in the code, so that the weight of an image falls with the number of classes.
        divergence = kl_div(learned, zero_shot, reduction="sum", log_target=True) / learned.numel()
        return loss + self.logit_pull * divergence


class _Independent(Prompted):
    def __init__(self, backbone: Backbone, method: PromptSRC) -> None:
        tokens = method.deep_tokens(backbone.text, min(method.depth, backbone.text.depth))
        super().__init__(backbone, tokens.shape[1], method.length_flag(tokens.shape[1]))
        self.image_tower = backbone.image
        blocks = min(method.depth, backbone.image.depth)
        self.textual = nn.Parameter(tokens)  # (d, L, W)
        self.visual = nn.Parameter(torch.empty(blocks, method.visual_length, backbone.image.width).normal_(std=0.02))

    def images(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) unit rows."""
        return normalize(self.image_tower.encode(x, insertions=Insertions(self.visual)), dim=-1)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 3, H, W) -> (B, C)
        return self.logits(self.images(x), self.texts(self.textual, classes), classes)
