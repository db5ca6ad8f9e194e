"""Labelled rows: images that are not decoded, or ready-made features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typing_extensions import Self  # in typing from Python 3.11 on

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
        domains: names of the visual domains, or of the data sets of a suite.
        split: (N,) int8: TRAIN, VAL, TEST, or UNASSIGNED for rows that the partition assigns to a split.
        unseen_test: whether TEST rows show concepts that no other row shows, in any domain; held-out domains are then
            evaluated on these rows only.
        rows_per_client: for data sets that generate clients on demand: the rows of each, one client after the other;
            `y`, `domain` and `x` are then objects that generate the rows they are indexed with. 0 for all others.
        notes: sentences for the user, without a final full stop: what was left out or assumed.
        owner: (N,) int64, the number of the person or device that each row belongs to; None: not known.
        group: (N,) int64, index into `groups`, by which fairness is measured; None: not known.
        groups: names of the values of a sensitive attribute.
        template: the text of a class that belongs to the set, `{}` where its name goes, or C of them, one for each
            class; None: the default.
        class_domain: of a suite, (C,) the domain that each class belongs to, ascending: a row's class is one of its
            domain, and only these compete for it in an evaluation. Empty: all classes compete in every domain.
    """

    y: np.ndarray
    domain: np.ndarray
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    split: np.ndarray
    unseen_test: bool = False
    rows_per_client: int = 0
    notes: tuple[str, ...] = ()
    template: str | tuple[str | None, ...] | None = None
    class_domain: tuple[int, ...] = ()
    owner: np.ndarray | None = None
    group: np.ndarray | None = None
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.y)

    @property
    def class_labels(self) -> tuple[str, ...]:
        """C class names for tables: with the domain in a suite, where two data sets may have a class of one name."""
        if not self.class_domain:
            return self.classes
        return tuple(f"{self.domains[k]}/{name}" for k, name in zip(self.class_domain, self.classes, strict=True))

    def competing(self, rows: np.ndarray) -> np.ndarray:
        """(C,) bool, the classes that compete for these rows: all, or in a suite those of their domains."""
        if not self.class_domain or not len(rows):
            return np.ones(len(self.classes), bool)
        return np.isin(self.class_domain, self.domain[rows])

    def take(self, rows: np.ndarray) -> Self:
        """These rows, in this order."""
        owner, group = (None if each is None else each[rows] for each in (self.owner, self.group))
        own = {"y": self.y[rows], "domain": self.domain[rows], "split": self.split[rows]}
        return replace(self, **own, owner=owner, group=group)

    def only(self, classes: Sequence[int]) -> Self:
        """The rows of these classes, which are numbered in this order."""
        number = np.full(len(self.classes), -1, np.int64)
        number[classes] = np.arange(len(classes))
        taken = self.take(np.flatnonzero(number[self.y] >= 0))
        template = self.template
        return replace(
            taken,
            y=number[taken.y],
            classes=tuple(self.classes[label] for label in classes),
            template=tuple(template[label] for label in classes) if isinstance(template, tuple) else template,
            class_domain=tuple(self.class_domain[label] for label in classes if self.class_domain),
        )


def vocabularies(classes: int, class_domain: Sequence[int]) -> list[list[int]]:
    """The indices of the classes that compete with each other: of all, or in a suite of each domain's."""
    if not len(class_domain):
        return [list(range(classes))]
    return [np.flatnonzero(np.equal(class_domain, domain)).tolist() for domain in np.unique(class_domain)]


@dataclass(frozen=True)
class _Rows(Sequence):
    """Rows of files that are read when they are accessed."""

    files: Sequence[Any]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.files[int(row)] for row in self.rows[index]]
        return self.files[int(self.rows[index])]


@dataclass(frozen=True, kw_only=True)
class Images(Labels):
    """N labelled images, which are not decoded.

    Attributes:
        files: N paths, or N encoded files as bytes.
        names: N names, for messages.
        other_files: counts of files not named like an image, by (domain, class) without images; for messages.
    """

    files: Sequence[Path | bytes]
    names: Sequence[str]
    other_files: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def open(self, index: int) -> Image.Image:
        """Decodes one image, in a mode that CLIP's preprocessing converts to RGB.

        Raises:
            InputError: the file cannot be read as an image; the message gives its name and the reason.
        """
        try:
            return decode(self.files[index])
        except ValueError as error:
            raise InputError(f"{self.names[index]} cannot be read: {error}") from None

    def take(self, rows: np.ndarray) -> Self:
        files = [self.files[row] for row in rows] if isinstance(self.files, list) else _Rows(self.files, rows)
        return replace(super().take(rows), files=files, names=[self.names[row] for row in rows])

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

    def take(self, rows: np.ndarray) -> Self:
        x = self.x[rows]
        x.flags.writeable = False
        return replace(super().take(rows), x=x)

    def only(self, classes: Sequence[int]) -> Self:
        return replace(super().only(classes), class_embeddings=self.class_embeddings[classes])
