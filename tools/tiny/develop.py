"""The development set that choices were made on; nothing of the evaluation sets is in it.

Drawings: three emoji families with CLDR subgroups as labels; a part of the concepts is unseen.
Photographs: the stamps of Tux Paint from Debian (GPL-2: measured on, never trained on or shipped).
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import corpus
import tower
from words import HeldOut

STAMPS = "tuxpaint-stamps-default"
LABELS = {  # label of the development set: the classes of `words.CLASSES` that it takes in
    "mammal": ("mammal",),
    "bird": ("bird",),
    "bug": ("bug",),
    "plant": ("plant", "flower", "tree"),
    "fruit": ("fruit",),
    "dessert": ("dessert",),
    "drink": ("drink",),
    "building": ("building", "house"),
    "vehicle": ("vehicle", "boat", "aircraft"),
    "clothing": ("clothing", "shoe", "hat"),
    "sports equipment": ("sports equipment",),
    "tool": ("tool",),
    "office supply": ("office supply",),
    "electronic device": ("electronic device", "computer", "camera"),
    "musical instrument": ("musical instrument",),
}
FOLDERS = {  # folder of the stamps: label
    "animals/birds": "bird",
    "animals/fish": "fish",
    "animals/insects": "insect",
    "animals/mammals": "mammal",
    "clothes": "clothing",
    "food/fruit": "fruit",
    "food/vegetables": "vegetable",
    "hobbies/music": "musical instrument",
    "household/tools": "tool",
    "plants/flowers": "flower",
    "plants/trees": "tree",
    "sports": "sports equipment",
    "vehicles": "vehicle",
    "town/houses": "house",
}
UNSEEN_SHARE = 0.25


@dataclass(frozen=True)
class Sample:
    """Features (N, 1280), labels (N,) as rows of `names`, and a domain name for each."""

    features: Tensor
    labels: Tensor
    domains: np.ndarray
    names: list[str]

    def accuracy(self, image: Callable, text: Callable) -> dict[str, float]:
        """Percent right by domain, mean over the classes that the domain has."""
        right = (image(self.features) @ text(self.names).T).argmax(1) == self.labels
        out = {}
        for domain in sorted(set(self.domains)):
            here = torch.from_numpy(self.domains == domain)
            shares = [right[here & (self.labels == c)] for c in self.labels[here].unique()]
            out[domain] = round(100 * float(np.mean([x.float().mean() for x in shares])), 1)
        return out


def unseen(icons: list[corpus.Icon]) -> HeldOut:
    """A quarter of the concepts of the development families' emoji, as names to hold out."""
    names = {i.name for i in icons if i.family in corpus.DEVELOPMENT and _label(i)}
    digests = {name: blake2b(name.encode(), digest_size=1).digest()[0] for name in names}
    return HeldOut.of({name for name in names if digests[name] < 256 * UNSEEN_SHARE})


def drawings(icons: list[corpus.Icon], features: Tensor, rows: Tensor, hidden: HeldOut) -> Sample:
    """The first view of each icon of the development families; domain "family unseen" or "seen"."""
    first = dict(reversed([(row, i) for i, row in enumerate(rows.tolist())]))
    shown = [(i, icons[row]) for row, i in first.items()]
    chosen = [(i, x) for i, x in shown if x.family in corpus.DEVELOPMENT and _label(x)]
    names = list(LABELS)
    kinds = ["unseen" if hidden.covers(icon.name) else "seen" for _, icon in chosen]
    return Sample(
        features[[i for i, _ in chosen]],
        torch.tensor([names.index(_label(icon) or "") for _, icon in chosen]),
        np.array([f"{icon.family} {kind}" for kind, (_, icon) in zip(kinds, chosen, strict=True)]),
        names,
    )


def photographs(downloads: Path) -> tuple[Sample, Sample]:
    """The stamps by folder and by the noun in their description."""
    root = corpus.unpack_debian(STAMPS, downloads) / "usr/share/tuxpaint/stamps"
    files = [f for f in sorted(root.rglob("*.png")) if _is_photo(f)]
    labels = [_folder_label(f.relative_to(root)) for f in files]
    files = [f for f, x in zip(files, labels, strict=True) if x]
    labels = [label for label in labels if label]
    nouns = [_noun(f) for f in files]
    network = tower.pretrained(downloads)
    features = torch.cat([tower.features(network, _open(f)[None]) for f in files])
    return _sample(features, labels, "stamps"), _sample(features, nouns, "stamps, exact noun")


def _sample(features: Tensor, labels: list[str], domain: str) -> Sample:
    names = sorted(set(labels))
    rows = torch.tensor([names.index(label) for label in labels])
    return Sample(features, rows, np.array([domain] * len(labels)), names)


def _label(icon: corpus.Icon) -> str | None:
    found = icon.classes[0] if icon.classes else None
    return next((label for label, classes in LABELS.items() if found in classes), None)


def _is_photo(file: Path) -> bool:
    drawn = {"cartoon", "plastic", "toys"} & set(file.parts)
    return not drawn and file.with_suffix(".txt").exists()  # without it, a mirrored copy


def _folder_label(path: Path) -> str | None:
    return next((label for folder, label in FOLDERS.items() if str(path).startswith(folder)), None)


def _noun(file: Path) -> str:
    line = file.with_suffix(".txt").read_text(encoding="utf8", errors="replace").splitlines()[0]
    words = line.split("(")[0].strip().rstrip(".!").lower().split()
    return " ".join(w for w in words if w not in ("a", "an", "the", "some"))


def _open(file: Path) -> Tensor:
    image = Image.open(file).convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    small = square.convert("RGB").resize((tower.SIZE, tower.SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
