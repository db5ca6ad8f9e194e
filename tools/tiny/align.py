"""Stage one: both pretrained towers frozen, linear maps into a common space trained.

Source: the locked towers of Zhai et al. 2022, arXiv 2111.07991, with several true captions an
image. No photograph is trained on: the rows of the ImageNet classifier stand for them, an idea
near ConSE, Norouzi et al. 2014, arXiv 1312.5650.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teacher
import tower
from captions import Texts, Thing
from words import CLASSES

DIM = 256
STEPS, BATCH, PHOTOS = 400, 1024, 0.3  # the last is the share of pseudo-photographs
CLASS_SHARE = 0.5  # weight of the loss over all class names
RATE, DECAY, WARMUP = 1e-3, 0.2, 50
DROPOUT = 0.5  # of features: without it, photographs of the development set lose nine points
REFIT_STEPS, REFIT_RATE = 400, 1e-3
_FIRST_SCALE, _LAST_SCALE = 15.0, 60.0
_CHOICE = (  # which caption stands for a thing, by chance: the first kind that it has
    ("classes", 0.45),
    ("above", 0.6),
    ("tags", 0.7),
)
_CLASS_CHANCE = 2.5  # of an icon with a class of up to 20 icons, to 0.8 without one
_PAIR = 0.15  # size of the difference of two other pictures that is added to half of the pictures


@dataclass(frozen=True)
class Corpus:
    """What is trained on.

    Attributes:
        features: (N, 1280) of the views.
        rows: (N,) the thing that each view shows.
        things: icons, then the classes of photographs.
        photos: (P,) rows of the classes of photographs in `things`.
        weights: (P, 1280) their rows in the classifier.
        grey: (1280,) features of a photograph of nothing.
    """

    features: Tensor
    rows: Tensor
    things: list[Thing]
    photos: Tensor
    weights: Tensor
    grey: Tensor


class ImageHead(nn.Module):
    """Standardises features and maps them; `folded` is the same as one linear layer."""

    mean: Tensor
    spread: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("spread", 2 * features.std(0).clamp(min=0.02))
        self.linear = nn.Linear(tower.WIDTH, DIM)

    def forward(self, features: Tensor) -> Tensor:
        standard = F.dropout((features - self.mean) / self.spread, DROPOUT, self.training)
        return F.normalize(self.linear(standard), dim=-1)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight (DIM, 1280) and bias (DIM,) for features as they come."""
        weight = self.linear.weight.detach() / self.spread
        return weight, self.linear.bias.detach() - weight @ self.mean


class TextHead(nn.Module):
    """Maps the teacher's vectors, less their mean; the hidden layer begins as nothing."""

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.linear = nn.Linear(teacher.WIDTH, DIM, bias=False)
        last = nn.Linear(2 * DIM, DIM)
        self.hidden = nn.Sequential(nn.Linear(teacher.WIDTH, 2 * DIM), nn.GELU(), last)
        nn.init.zeros_(last.weight)

    def forward(self, vectors: Tensor) -> Tensor:
        centred = F.normalize(vectors - self.mean, dim=-1)
        return F.normalize(self.linear(centred) + self.hidden(centred), dim=-1)


def photo_statistics(network: Any) -> tuple[Tensor, Tensor]:
    """The classifier's rows (1000, 1280), and the mean feature of photographs (1280,).

    A feature is the average of relu6 over a normalised channel, so its mean over photographs
    follows from the scale and shift of the last normalisation alone.
    """
    norm = network.bn2
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    grey = (noise * norm.weight.detach().abs() + norm.bias.detach()).clamp(0, 6).mean(0)
    return network.get_classifier().weight.detach(), grey


class Pictures:
    """Draws batches of features with the things that they show."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.mean = corpus.features.mean(0)
        self.reach = (corpus.features - self.mean).norm(dim=1).mean()
        centred = corpus.weights - corpus.weights.mean(0)
        self.directions = F.normalize(centred.clamp(min=0), dim=1)[corpus.photos - self._icons]
        self.chances = _chances([corpus.things[i] for i in range(self._icons)])[corpus.rows]

    @property
    def _icons(self) -> int:
        return len(self.corpus.things) - len(self.corpus.weights)

    def batch(self, size: int, photos: float) -> tuple[Tensor, Tensor]:
        """(B, 1280) features and (B,) rows of things."""
        few = int(size * photos)
        views = torch.multinomial(self.chances, size - few)
        classes = torch.randint(len(self.corpus.photos), (few,))
        moved = _PAIR * (torch.rand(size - few, 1) < 0.5) * self._difference(size - few)
        shown = torch.cat([self.corpus.rows[views], self.corpus.photos[classes]])
        return torch.cat([self.corpus.features[views] + moved, self._photos(classes)]), shown

    def _photos(self, classes: Tensor) -> Tensor:
        count = len(classes)
        base = self.corpus.grey + torch.rand(count, 1) * (self.mean - self.corpus.grey)
        strength = self.reach * (0.3 + 0.7 * torch.rand(count, 1))
        noise = 0.5 * torch.rand(count, 1) * self._difference(count)
        return base + strength * self.directions[classes] + noise

    def _difference(self, count: int) -> Tensor:
        a, b = torch.randint(len(self.corpus.features), (2, count))
        return self.corpus.features[a] - self.corpus.features[b]


class Captioner:
    """Draws a caption for each thing, and knows which other captions of a batch are true of it."""

    def __init__(self, things: list[Thing], texts: Texts) -> None:
        row = texts.row
        self.true = [[row[c] for c in thing.captions] for thing in things]
        kinds = [kind for kind, _ in _CHOICE]
        self.kinds = [{k: [row[c] for c in getattr(thing, k)] for k in kinds} for thing in things]
        self.names = [row[thing.name] for thing in things]
        self.kind = torch.tensor([[float(c in t.captions) for c in CLASSES] for t in things])

    def draw(self, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unique text rows (U,), the drawn one of each picture (B,), and what is true (B, U)."""
        drawn = [self._one(i) for i in shown.tolist()]
        unique = {row: column for column, row in enumerate(dict.fromkeys(drawn))}
        true = torch.zeros(len(drawn), len(unique))
        for i, thing in enumerate(shown.tolist()):
            true[i, [unique[row] for row in self.true[thing] if row in unique]] = 1
        return torch.tensor(list(unique)), torch.tensor([unique[row] for row in drawn]), true

    def _one(self, thing: int) -> int:
        chance = random.random()
        for kind, share in _CHOICE:
            if chance < share and self.kinds[thing][kind]:
                return random.choice(self.kinds[thing][kind])
        return self.names[thing]


def contrast(scores: Tensor, drawn: Tensor, true: Tensor) -> Tensor:
    """Symmetric cross-entropy with several right answers, between B pictures and U texts.

    A picture's target is half its drawn caption and half all that are true of it. Texts are
    unique in a batch; half the logarithm of how often each was drawn makes up for it.
    """
    often = torch.bincount(drawn, minlength=scores.shape[1]).float()
    target = 0.5 * true / true.sum(1, keepdim=True)
    target = target + 0.5 * F.one_hot(drawn, scores.shape[1])
    by_picture = -(target * (scores + 0.5 * often.log()).log_softmax(1)).sum(1).mean()
    answers = true.T / true.T.sum(1, keepdim=True)
    by_text = -(answers * scores.T.log_softmax(1)).sum(1)
    return (by_picture + (by_text * often.sqrt()).sum() / often.sqrt().sum()) / 2


def classify(scores: Tensor, true: Tensor) -> Tensor:
    """Cross-entropy over all class names, of the pictures that have a class."""
    counts = true.sum(1, keepdim=True)
    target = true / counts.clamp(min=1)
    return -(target * scores.log_softmax(1)).sum() / (counts > 0).sum()


def train(corpus: Corpus, texts: Texts, steps: int = STEPS) -> tuple[ImageHead, TextHead, Tensor]:
    """Trains both heads; returns them and the logarithm of the scale."""
    torch.manual_seed(0)
    random.seed(0)
    image, text = ImageHead(corpus.features), TextHead(texts.vectors.mean(0))
    scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE)))
    _fit(corpus, texts, image, text, scale, RATE, steps)
    return image.eval(), text.eval(), scale.detach()


def refit(corpus: Corpus, texts: Texts, image: ImageHead, scale: Tensor, steps: int = REFIT_STEPS):
    """Goes on with the image head alone, against the vectors of `texts` as they are, (N, DIM)."""
    torch.manual_seed(1)
    random.seed(1)
    scale = nn.Parameter(scale.clone())
    _fit(corpus, texts, image.train(), nn.Identity(), scale, REFIT_RATE, steps)
    return image.eval(), scale.detach()


def _fit(corpus, texts, image, text, scale, rate, steps) -> None:
    pictures, captioner = Pictures(corpus), Captioner(corpus.things, texts)
    class_vectors = texts.vectors[[texts.row[name] for name in CLASSES]]
    maps = [*image.parameters(), *text.parameters()]
    groups = [{"params": maps, "weight_decay": DECAY}, {"params": [scale], "weight_decay": 0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * schedule(step / steps, step, WARMUP)
        features, shown = pictures.batch(BATCH, PHOTOS)
        unique, drawn, true = captioner.draw(shown)
        found = scale.exp() * image(features)
        loss = contrast(found @ text(texts.vectors[unique]).T, drawn, true)
        by_class = classify(found @ text(class_vectors).T, captioner.kind[shown])
        optimiser.zero_grad()
        (loss + CLASS_SHARE * by_class).backward()
        optimiser.step()
        scale.data.clamp_(0, math.log(_LAST_SCALE))
        if (step + 1) % 100 == 0:
            print(f"align {step + 1} losses {loss:.3f} {by_class:.3f}", flush=True)


def schedule(share: float, step: int, warmup: int) -> float:
    """Factor of the learning rate: a linear start, then half a cosine to a fiftieth."""
    return min(1, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


def _chances(things: list[Thing]) -> Tensor:
    """How often each icon is drawn: a class of few icons is drawn more often an icon."""
    counts = {}
    for thing in things:
        for name in thing.classes:
            counts[name] = counts.get(name, 0) + 1
    chances = []
    for thing in things:
        rarest = min((counts[name] for name in thing.classes), default=0)
        by_class = _CLASS_CHANCE / math.sqrt(max(1, rarest / 20))
        chance = by_class if thing.classes else 0.8 if thing.above else 0.25
        chances.append(thing.weight * chance)
    return torch.tensor(chances)
