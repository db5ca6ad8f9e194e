"""Data sets: where images (or features of one's own) come from.

A data set's file says `load(root)`. Pixels stay where they are until somebody asks for one image.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fedsim.cache import Notice, content_digests
from fedsim.datasets._pictures import VERSION, decode
from fedsim.errors import InputError
from fedsim.files import digest

TRAIN, VAL, TEST, UNASSIGNED = 0, 1, 2, -1


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What is known of N rows without looking at them.

    Attributes:
        y: (N,) int64, index into `classes`.
        domain: (N,) int64, index into `domains`.
        classes: C class names, as they go into the prompt.
        domains: names of the visual domains.
        split: (N,) int8 of TRAIN, VAL, TEST, or UNASSIGNED where the set leaves the split to us.
        unseen_test: True where TEST rows show concepts that no other row shows, in any domain; held-out
            domains are then judged on these rows only.
        rows_per_client: for data sets that generate clients on demand: the rows of each, one client after the other;
            `y`, `domain` and `x` are then objects that generate the rows they are indexed with. 0 for all others.
        notes: sentences for the user, without a final stop: what was left out of the set or taken for granted.
    """

    y: np.ndarray
    domain: np.ndarray
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    split: np.ndarray
    unseen_test: bool = False
    rows_per_client: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, kw_only=True)
class Images(Labels):
    """N labelled images; their pixels stay where they are.

    Attributes:
        files: N images, each a path or the bytes of an encoded file.
        names: N names for people, used in messages.
    """

    files: Sequence[Path | bytes]
    names: Sequence[str]

    def open(self, index: int) -> Image.Image:
        """One image, in a mode that CLIP's preprocessing converts to RGB.

        Raises:
            InputError: the file cannot be read as an image; the message names it and says why.
        """
        try:
            return decode(self.files[index])
        except ValueError as error:
            raise InputError(f"{self.names[index]} cannot be read: {error}") from None

    def take(self, rows: np.ndarray) -> "Images":
        """The same set with only these rows, in this order."""
        return replace(
            self,
            files=[self.files[row] for row in rows],
            names=[self.names[row] for row in rows],
            y=self.y[rows],
            domain=self.domain[rows],
            split=self.split[rows],
        )

    def fingerprint(self, cache: Path | None = None, notice: Notice = lambda file: None) -> str:
        """Changes with the bytes of an image, their order, or how they are decoded; not with names, places and times.

        Args:
            cache: where the digests of files are remembered, so that unchanged files are not read again.
        """
        return digest(f"decoding {VERSION}", content_digests(self.files, cache, notice))


@dataclass(frozen=True, kw_only=True)
class Features(Labels):
    """N labelled features that were computed elsewhere, and the embeddings of the classes.

    Attributes:
        x: (N, D) float16 or float32, read-only; rows need not have unit length.
        class_embeddings: (C, D) float32 or float64, unit rows: the text feature of each class.
        logit_scale: exp of CLIP's temperature parameter, about 100 for OpenAI's weights.
    """

    x: np.ndarray
    class_embeddings: np.ndarray
    logit_scale: float


class Dataset(ABC):
    """A source of images. Subclasses are components: frozen dataclasses of their own options."""

    @abstractmethod
    def load(self, root: Path | None) -> Images | Features:
        """Lists the images below `root` (`--data-dir`) and decodes none; or reads features of one's own.

        Raises:
            InputError: a folder, a domain or a class is missing or empty.
        """
