"""What clients read instead of images: representations that are computed once, and the embeddings of the classes."""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.cache import map_array
from fedsim.datasets import Labels


@dataclass(frozen=True)
class ClassEmbeddings:
    """The text side of a frozen CLIP.

    Attributes:
        vectors: (C, D) float32 or float64, unit rows: the text feature of each class.
        logit_scale: exp of CLIP's temperature parameter, about 100 for OpenAI's weights.
        templates: the text of a class, with `{}` for its name, or in a suite C of them, one for each class; of several,
            `vectors` are the normalized means of the text features. Unknown, and "{}", for ready-made features.
    """

    vectors: np.ndarray
    logit_scale: float
    templates: tuple[str | tuple[str, ...], ...] = ("{}",)


@dataclass(frozen=True)
class Representations:
    """What is computed once of N images, by name: `features`, and perhaps `tokens` or `pixels`.

    An array has N rows, or views * N: all images of one view, then all of the next. View 0 is the image as it is
    preprocessed for evaluation, the others are augmented. Arrays are read-only, and need not be in memory.

    A pickled object contains `arrays` and the paths of `files`; each process maps the files when it first reads them.
    For machines that do not share a file system, see `inline`.

    Attributes:
        count: rows of a view: N, or fewer if the arrays have only some of the rows.
        key: changes with the features, and names them in a run's folder.
        files: files of the cache.
        arrays: representations that are in no file. Generated data have an object with rows on demand here.
        views: number of views, augmented ones included.
        positions: (rows of the data set,) int64, where the arrays have each row, if they have only some of the rows
            or rows share images; -1 for rows that they do not have. None: in the order of the data set.
    """

    count: int
    key: str
    files: dict[str, Path] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    views: int = 1
    positions: np.ndarray | None = None

    def read(self, name: str, rows: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """(n,) rows of the data set -> (n, ...), a copy.

        Args:
            views: (n,) the view of each row; None: view 0.

        Raises:
            Stopped: the file was removed or replaced during the run.
        """
        at = self.at(rows)
        return self._array(name)[at if views is None else at + views * self.count]

    def at(self, rows: np.ndarray) -> np.ndarray:
        """(n,) rows of the data set -> (n,) rows of the arrays."""
        if self.positions is None:
            return rows
        at = self.positions[rows]
        if at.size and at.min() < 0:  # a negative index would silently be another row
            raise RuntimeError(f"row {rows[at.argmin()]} was not encoded")
        return at

    @property
    def features(self) -> np.ndarray:
        """(N, D) float16 or float32, read with `at`; rows need not have unit length."""
        array = self._array("features")
        return array if self.views == 1 else array[: self.count]

    def inline(self) -> "Representations":
        """The same with arrays instead of files: Ray's object store holds them once per machine for all processes."""
        return replace(self, files={}, arrays=self.arrays | {name: self._array(name) for name in self.files})

    def _array(self, name: str) -> Any:
        if name in self.arrays:
            return self.arrays[name]
        # Not when unpickled: an error that is raised while Ray unpickles loses its type.
        if name not in self._mapped:
            self._mapped[name] = map_array(self.files[name])
        return self._mapped[name]

    @cached_property
    def _mapped(self) -> dict[str, np.ndarray]:
        # Per object, not per process: a later run may have found the file damaged and replaced it.
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_mapped"}


@dataclass(frozen=True, kw_only=True)
class Encoded(Labels):
    """A data set as clients read it: labels, representations of the images, embeddings of the classes."""

    representations: Representations
    class_embeddings: ClassEmbeddings

    def showing(self, images: np.ndarray) -> "Encoded":
        """The same labels, each with the image of another row: (N,) the row whose image each row shows."""
        before = self.representations.positions
        positions = images if before is None else before[images]
        return replace(self, representations=replace(self.representations, positions=positions))

    def inline(self) -> "Encoded":
        """See `Representations.inline`."""
        return replace(self, representations=self.representations.inline())


def with_labels(labels: Labels, representations: Representations, class_embeddings: ClassEmbeddings) -> Encoded:
    """The labels of any data set with representations."""
    values = {each.name: getattr(labels, each.name) for each in fields(Labels)}
    return Encoded(**values, representations=representations, class_embeddings=class_embeddings)
