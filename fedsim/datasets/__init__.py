"""Data sets: labelled images, or ready-made features.

A data set defines `load(root)`, which lists images without decoding them.
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
    """The labels of N rows (images or features).

    Attributes:
        y: (N,) int64, index into `classes`.
        domain: (N,) int64, index into `domains`.
        classes: C class names, as they go into the prompt.
        domains: names of the visual domains.
        split: (N,) int8: TRAIN, VAL, TEST, or UNASSIGNED for rows that the partition assigns to a split.
        unseen_test: whether TEST rows show concepts that no other row shows, in any domain; held-out domains are then
            evaluated on these rows only.
        rows_per_client: for data sets that generate clients on demand: the rows of each, one client after the other;
            `y`, `domain` and `x` are then objects that generate the rows they are indexed with. 0 for all others.
        notes: sentences for the user, without a final full stop: what was left out or assumed.
        template: the text of a class that belongs to the set, `{}` where its name goes; None: the default.
    """

    y: np.ndarray
    domain: np.ndarray
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    split: np.ndarray
    unseen_test: bool = False
    rows_per_client: int = 0
    notes: tuple[str, ...] = ()
    template: str | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, kw_only=True)
class Images(Labels):
    """N labelled images, which are not decoded.

    Attributes:
        files: N paths, or N encoded files as bytes.
        names: N names, for messages.
    """

    files: Sequence[Path | bytes]
    names: Sequence[str]

    def open(self, index: int) -> Image.Image:
        """Decodes one image, in a mode that CLIP's preprocessing converts to RGB.

        Raises:
            InputError: the file cannot be read as an image; the message gives its name and the reason.
        """
        try:
            return decode(self.files[index])
        except ValueError as error:
            raise InputError(f"{self.names[index]} cannot be read: {error}") from None

    def take(self, rows: np.ndarray) -> "Images":
        """These rows, in this order."""
        return replace(
            self,
            files=[self.files[row] for row in rows],
            names=[self.names[row] for row in rows],
            y=self.y[rows],
            domain=self.domain[rows],
            split=self.split[rows],
        )

    def fingerprint(self, cache: Path | None = None, notice: Notice = lambda file: None) -> str:
        """A key of the images' bytes, their order and the decoding, not of names, paths and times.

        Args:
            cache: the folder that remembers the digests of files, so that unchanged files are not read again.
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
    """A source of images or features. Subclasses are components: frozen dataclasses of their options."""

    @abstractmethod
    def load(self, root: Path | None) -> Images | Features:
        """Lists the images below `root` (`--data-dir`) without decoding them, or reads features.

        Raises:
            InputError: a folder, a domain or a class is missing or empty.
        """
