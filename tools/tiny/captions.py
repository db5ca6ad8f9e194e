"""Which texts there are, which of them are true of what, and the teacher's vectors of all of them.

Source: ours.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor

import corpus
from teacher import Teacher
from words import CLASSES

ABOVE = 6  # hypernyms used of an icon; further ones say little
_EMOJI_WEIGHT = 4.0  # CLDR labels them; other icons have but a file name
_TOKENS = 14_000  # whole-word tokens, the most frequent first, that begin with a word's meaning
_NOUNS = 8_000


@dataclass(frozen=True)
class Thing:
    """An icon, or a class of photographs, with its true captions from narrow to wide."""

    name: str
    classes: tuple[str, ...]
    above: tuple[str, ...]
    tags: tuple[str, ...]
    weight: float = 1.0  # how often it is drawn, next to what its captions say

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.name, *self.classes, *self.above, *self.tags)))


@dataclass(frozen=True)
class Texts:
    """Texts with the teacher's unit vectors, (N, 384)."""

    names: list[str]
    vectors: Tensor

    @property
    def row(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


def of_icons(icons: list[corpus.Icon]) -> list[Thing]:
    """One thing an icon, in order."""
    weights = [_EMOJI_WEIGHT if i.family in corpus.EMOJI_FAMILIES else 1.0 for i in icons]
    found = zip(icons, weights, strict=True)
    return [Thing(i.name, i.classes, i.above[:ABOVE], i.tags, w) for i, w in found]


def of_photos(downloads: Path) -> list[Thing]:
    """The 1,000 classes of ImageNet, in the classifier's order."""
    photos = corpus.namer(downloads).photos()
    return [Thing(n, CLASSES[c] if c else (), tuple(a[:ABOVE]), ()) for n, c, a in photos]


def tokens() -> dict[str, int]:
    """Whole words among open_clip's tokens, and their numbers."""
    found = open_clip.tokenizer.SimpleTokenizer().encoder.items()
    words = {name.removesuffix("</w>"): i for name, i in found if name.endswith("</w>")}
    plain = sorted((i, w) for w, i in words.items() if len(w) > 2 and w.isascii() and w.isalpha())
    return {word: i for i, word in plain[:_TOKENS]}


def write_texts(icons_file: Path, downloads: Path, file: Path) -> None:
    """Every text that training needs, with its vector."""
    things = of_icons(corpus.load(icons_file)) + of_photos(downloads)
    names = dict.fromkeys(caption for thing in things for caption in thing.captions)
    names |= dict.fromkeys(x for synonyms in CLASSES.values() for x in synonyms)
    names |= dict.fromkeys(x for name in list(names) for x in name.split() if len(x) > 1)
    names |= dict.fromkeys(corpus.wordnet(downloads).frequent[:_NOUNS])
    names |= dict.fromkeys(tokens())
    vectors = Teacher(downloads)(list(names)).half().numpy()
    file.with_suffix(".json").write_text(json.dumps(list(names)), encoding="utf-8")
    np.save(file.with_suffix(".npy"), vectors)


def read_texts(file: Path) -> Texts:
    """Reads what `write_texts` wrote."""
    names = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return Texts(names, torch.from_numpy(np.load(file.with_suffix(".npy"))).float())
