"""Data sets: where images (or features of one's own) come from.

A data set's file says `load(root)`. Pixels stay where they are until somebody asks for one image.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from fedsim.cache import Notice, content_digests, map_array
from fedsim.datasets._pictures import VERSION, decode
from fedsim.errors import InputError
from fedsim.files import digest

TRAIN, VAL, TEST, UNSAID = 0, 1, 2, -1


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What is known of N rows without looking at them.

    Attributes:
        y: (N,) int64, index into `classes`.
        domain: (N,) int64, index into `domains`.
        classes: C class names, as they go into the prompt.
        domains: names of the visual domains.
        split: (N,) int8 of TRAIN, VAL, TEST, or UNSAID where the set leaves the split to us.
        unseen_test: True where TEST rows show concepts that no other row shows, in any domain; held-out
            domains are then judged on these rows only.
        block: rows of each client, one client after the other, in sets that make clients on demand; their arrays
            are asked for rows and never held. 0 in all others.
        notes: sentences for the user, without a final stop: what was left out of the set or taken for granted.
    """

    y: np.ndarray
    domain: np.ndarray
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    split: np.ndarray
    unseen_test: bool = False
    block: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, kw_only=True)
class Images(Labelled):
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
class Features(Labelled):
    """What a frozen image tower says of N images, and its text tower of C classes.

    Pickled, it has the path of its rows and not the rows: each process maps the file itself when it first reads them.
    `carried` has the rows with it, for machines that do not see the file.

    Attributes:
        file: file of the cache that holds `x`; None while the rows are only in memory, or made on demand.
        x: (N, D) float16 or float32, read-only; rows need not have unit length.
        class_embeddings: (C, D) float32 or float64, unit rows: the text feature of each class.
        logit_scale: exp of CLIP's temperature parameter, about 100 for OpenAI's weights.
        prompt: the text of a class, `{}` where its name goes; of features of one's own nobody knows.
        augment: augmented views that are kept of each image.
        kept: by level of `clip.sites.IMAGE_LEVELS`, a file of what else is kept of the images, in (1 + augment) views:
            (views * N, ...), all images of a view one after the other.
        aboard: by level, what is in these files.
    """

    file: Path | None
    x: np.ndarray
    class_embeddings: np.ndarray
    logit_scale: float
    prompt: str = "{}"
    augment: int = 0
    kept: dict[str, Path] = field(default_factory=dict)
    aboard: dict[str, np.ndarray] | None = None

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """By level, what else is cached of the images."""
        # Of this object, not of the process: a later run may have found the file damaged, and replaced it.
        return {level: map_array(file) for level, file in self.kept.items()} if self.aboard is None else self.aboard

    def carried(self) -> "Features":
        """The same with all rows aboard: Ray's object store has them once on each machine, for all processes there."""
        if self.block or self.aboard is not None:
            return self
        return replace(self, aboard=self._arrays)

    def take(self, level: str, rows: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """What is kept of n rows at a level, (n, ...); a copy.

        Args:
            views: (n,) which view of each; none given: the image as it is preprocessed for judging.
        """
        if level not in self.kept:
            return self.x[rows]
        return self._arrays[level][rows if views is None else rows + views * len(self)]

    def __getstate__(self) -> dict:
        if self.block or self.aboard is not None:
            return self.__dict__ | {"x": self.x}
        if self.file is None:
            raise TypeError("features that are not in a file yet cannot be sent to another process")
        return {name: value for name, value in self.__dict__.items() if name not in ("x", "_arrays")}

    def __getattr__(self, name: str) -> np.ndarray:
        # Rows that have not travelled are mapped when they are first read: an error while Ray unpickles loses its type.
        if name != "x" or self.file is None:
            raise AttributeError(name)
        return self.__dict__.setdefault("x", map_array(self.file))


class Dataset(ABC):
    """A source of images. Subclasses are components: frozen dataclasses of their own options."""

    @abstractmethod
    def load(self, root: Path | None) -> Images | Features:
        """Lists the images below `root` (`--data-dir`) and decodes none; or reads features of one's own.

        Raises:
            InputError: a folder, a domain or a class is missing or empty.
        """
