"""Visual tokens that a network generates from an image and the attributes of the active classes (FedMVP).

Source: Singha et al., ICCV 2025, arXiv 2504.20860; details as in the authors' code, mainaksingha01/FedMVP, commit
246800e (model/FedMVP.py, model/descriptors.py, federated/client.py, config/defaults.py).
Unread: the paper, beyond its abstract.
"""

from collections.abc import ItemsView
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, cosine_similarity, cross_entropy, gelu, normalize, one_hot

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.errors import InputError, listing, shortened
from fedsim.fields import expanded
from fedsim.methods import Backbone, Batch, Method, Schedule
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear, Log
from fedsim.yaml_files import read_mapping

TEXTS = 256  # encoded at once


def _attributes(value: Any) -> Any:
    """The attributes of classes: the path of a file, a mapping, or pairs of a class and a list."""
    if file := expanded(Path(value)) if isinstance(value, str | Path) else None:
        value = read_mapping(file, "classes to lists of attributes")
    pairs: Any = value.items() if isinstance(value, dict) else value
    for pair in pairs if isinstance(pairs, list | tuple | ItemsView) else (pairs,):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[1], list | tuple)):
            raise InputError(f"attributes need a list of texts for each class, not {shortened(repr(pair))}")
    return tuple((str(name), tuple(map(str, each))) for name, each in pairs)


Attributes = Annotated[tuple[tuple[str, tuple[str, ...]], ...], BeforeValidator(_attributes)]


@component
class FedMVP(Method):
    """Defaults are those of the authors' program without flags.

    The program is Launch_FL.py with config/defaults.py. Its 100 rounds, 20 classes per client and uniform averaging are
    set in the experiment.

    The texts of a class are that of `--prompt` with each of its attributes after a comma, such as "a photo of a dog,
    which has fur"; the score of a class is the mean of their cosines with the image. `attributes` is a YAML or JSON
    file that maps each class to a list of attributes. Without the file, and for a class with an empty list, the text is
    that of the name alone; a class that is not in the file is refused. In a run's config.yaml are the attributes
    themselves, so that the file may change or move.

    The loss is the cross-entropy and `consistency` times the distance, 1 - cosine, of the image's feature with tokens
    from that of the same image without; the latter are mirrored in half of the batches, at random.

    Differs: the code takes one step in a round, on the last batch; here each batch is a step. It cuts attributes after
    77 characters, and writes "which is" before any that begins with an a. When a loss is below 0.5, it trains low-rank
    pairs in place of the attention from then on; here the attention is trained throughout.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    lr: float = Field(3e-3, search=Log(1e-4, 1e-1))
    schedule: Schedule = "cosine"
    momentum: float = 0.9
    weight_decay: float = 1e-5
    batch_size: int = Field(128, search=Choice((32, 64, 128)))
    persist_optimizer: bool = True
    label_space: Literal["all", "client"] = "client"
    attributes: Attributes = Field((), description="file with a list of attributes for each class")
    length: int = Field(4, ge=1, le=4096, search=Choice((2, 4, 8)), description="generated tokens next to the patches")
    heads: int = Field(4, ge=1, description="heads of the attention from patches to attributes")
    consistency: float = Field(
        10.0, ge=0, search=Linear(0.0, 20.0), description="weight of the distance from the feature without tokens"
    )

    joint_classes = True  # the tokens, and so every logit, depend on all active classes

    @property
    def sites(self) -> tuple[Site, ...]:
        return "text_tokens", "visual_tokens"

    def build(self, backbone: Backbone) -> nn.Module:
        if (width := backbone.image.width) % self.heads:
            raise InputError(f"--method.heads must divide {width}, the image tower's width; {self.heads} does not")
        return _Generated(backbone, self)

    def loss(self, module: "_Generated", batch: Batch) -> Tensor:
        texts, owners = module.described(batch.classes)
        images = module.images(batch.x, texts)
        with torch.no_grad():
            plain = module.image_tower.encode(batch.x.flip(-1) if torch.rand(()) < 0.5 else batch.x)
        distance = 1 - cosine_similarity(images, plain, dim=-1).mean()
        logits = module.score(images, texts, owners, batch.classes)
        return cross_entropy(logits, batch.y) + self.consistency * distance

    def texts_of(self, backbone: Backbone) -> tuple[list[str], list[int]]:
        """The texts of all classes, and the class of each.

        Raises:
            InputError: the file of attributes does not have a class.
        """
        by_class = dict(self.attributes) or dict.fromkeys(backbone.classes, ())
        if missing := [name for name in backbone.classes if name not in by_class]:
            raise InputError(
                f"--method.attributes has no {listing(missing)}; an empty list leaves a class its name alone"
            )
        texts = [
            (_with(text, attribute), label)
            for label, (name, text) in enumerate(zip(backbone.classes, backbone.texts, strict=True))
            for attribute in by_class[name] or ("",)
        ]
        return [text for text, _ in texts], [label for _, label in texts]


def _with(text: str, attribute: str) -> str:
    """A text with an attribute after a comma, before its full stop if it has one."""
    stem = text.removesuffix(".")
    return f"{stem}, {attribute}{text[len(stem) :]}" if attribute else text


class _Generated(nn.Module):
    """The network has 9,845,760 parameters with ViT-B/16."""

    tokens: Tensor  # (N, T), of N texts
    owners: Tensor  # (N,), ascending

    def __init__(self, backbone: Backbone, method: FedMVP) -> None:
        super().__init__()
        self.text_tower, self.image_tower = backbone.text, backbone.image
        self.scale, self.count, self.classes = backbone.logit_scale, method.length, len(backbone.classes)
        if not backbone.classes:
            raise InputError("attributes need the names of the classes; there are none")
        texts, owners = method.texts_of(backbone)
        tokens = self.text_tower.tokenize(texts)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("owners", torch.tensor(owners, device=tokens.device), persistent=False)
        self.encoded: Tensor | None = None
        width = backbone.image.width
        self.project = nn.Linear(backbone.width, width)
        self.norm_patches, self.norm_texts = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, method.heads, batch_first=True)
        self.norm, self.widen = nn.LayerNorm(width), nn.Linear(width, 8 * width)
        self.narrow = nn.Linear(4 * width, width)

    @torch.no_grad()
    def described(self, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, D) unit rows, the texts of the active classes; and (N,) the class of each."""
        if self.encoded is None:  # once: they are constant, and as many as all attributes of all classes
            parts = self.tokens.split(TEXTS)
            encoded = [self.text_tower.encode(part, self.text_tower.ends(part)) for part in parts]
            self.encoded = normalize(torch.cat(encoded), dim=-1)
        rows = slice(None) if classes is None else classes[self.owners]
        return self.encoded[rows], self.owners[rows]

    def visual_tokens(self, x: Tensor, texts: Tensor) -> Tensor:
        """(B, 3, H, W) and (N, D) texts -> (B, n, W) tokens."""
        patches, context = self.image_tower.patches(x), self.project(texts).expand(len(x), -1, -1)
        # As in the code, the norm is of the keys alone, and there is no residual connection around the attention.
        attended, _ = self.attention(self.norm_patches(patches), self.norm_texts(context), context, need_weights=False)
        value, gate = self.widen(self.norm(attended)).chunk(2, dim=-1)
        attended = attended + self.narrow(value * gelu(gate))
        return adaptive_avg_pool1d(attended.mT, self.count).mT

    def images(self, x: Tensor, texts: Tensor) -> Tensor:
        """(B, 3, H, W) and (N, D) texts -> (B, D) features."""
        return self.image_tower.encode(x, insertions=Insertions(self.visual_tokens(x, texts)[None]))

    def score(self, images: Tensor, texts: Tensor, owners: Tensor, classes: Tensor | None) -> Tensor:
        """(B, D) features, and (N, D) texts of classes (N,) -> (B, C) logits, -inf for inactive classes."""
        # The mean of the cosines with the texts of a class is the product with their mean.
        members = one_hot(owners, self.classes).T.to(texts)
        means = members @ texts / members.sum(dim=1, keepdim=True).clamp(min=1)
        logits = self.scale * normalize(images, dim=-1) @ means.T
        return logits if classes is None else logits.masked_fill(~classes, -torch.inf)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, 3, H, W) -> (B, C)
        texts, owners = self.described(classes)
        return self.score(self.images(x, texts), texts, owners, classes)
