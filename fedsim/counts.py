"""Evaluation: counts, never means. Every mean in a report is derived from these."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np

from fedsim.datasets import Labels

# neighbor: test rows of other clients, by a client's model. attacked: those of its test rows that an attack is to have
# predicted as another class, with the trigger of the attack; correct are those that are predicted as that class.
SPLITS = ("val", "test", "new", "neighbor", "attacked")
COLUMNS = ("client", "domain", "split", "correct", "total", "correct_own")
GROUPS = ("own", "held_out", "new")  # test rows of training clients' domains, of held-out domains, of new classes
BINS = 15  # of confidence, as in Guo et al. 2017, arXiv 1706.04599
Entries = Sequence[tuple[int, str, np.ndarray]]


@dataclass(frozen=True)
class Counts:
    """Counts of some clients on some rows. Only test rows are in more than `scores`.

    The prediction is the most probable of all trained classes, or of the new ones where the row is of a new class. For
    `correct_own` it is the most probable of the client's own classes. In a suite, only classes of the row's data set
    are considered.

    Attributes:
        scores: (cells, 6) int32, by client, domain and split, as in `COLUMNS`: domain and split are indices.
        labels: (3 + G, C, 3) int64, by group and class: correct predictions, all predictions of it, its rows. The
            groups are `GROUPS`, and then clients' own test rows in each of `Labels.groups`.
        bins: (3, 15, 2) int64, by group and confidence in equal widths: correct predictions, rows.
        confidence: (3, 15) float64, sum over the rows of a bin of the prediction's probability.
    """

    scores: np.ndarray = field(default_factory=lambda: np.zeros((0, len(COLUMNS)), np.int32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros((len(GROUPS), 0, 3), np.int64))
    bins: np.ndarray = field(default_factory=lambda: np.zeros((len(GROUPS), BINS, 2), np.int64))
    confidence: np.ndarray = field(default_factory=lambda: np.zeros((len(GROUPS), BINS)))

    def flat(self) -> np.ndarray:
        """(n,) int32, all of it bit by bit, with the numbers of groups and of classes first."""
        parts = (part.ravel().view(np.int32) for part in (self.scores, self.labels, self.bins, self.confidence))
        return np.concatenate([np.array(self.labels.shape[:2], np.int32), *parts])

    @classmethod
    def from_flat(cls, flat: np.ndarray) -> Counts:
        """The inverse of `flat`."""
        like = cls(labels=np.zeros((*flat[:2], 3), np.int64))
        rest = like.labels, like.bins, like.confidence
        sizes = [part.nbytes // flat.itemsize for part in rest]
        scores, *others = np.split(flat, len(flat) - np.cumsum(sizes[::-1])[::-1])
        others = [own.copy().view(part.dtype).reshape(part.shape) for own, part in zip(others, rest, strict=True)]
        return cls(scores[2:].reshape(-1, len(COLUMNS)), *others)


def tally(
    entries: Entries,
    predictions: np.ndarray,
    own_predictions: np.ndarray,
    confidence: np.ndarray,
    rows: Labels,
    held_out: Collection[int] = (),
    expected: Sequence[np.ndarray] | None = None,
) -> Counts:
    """Counts of some clients on some rows.

    Args:
        entries: client, split and the rows on which it is evaluated, (n,) int64.
        predictions, own_predictions: (sum of n,) classes, in the order of the entries.
        confidence: (sum of n,) float32, the probability of each prediction.
        held_out: indices of the held-out domains.
        expected: of each entry, (n,) the classes that count as correct (default: those of its rows).
    """
    width, classes = len(rows.domains), len(rows.classes)
    indices = np.concatenate([np.empty(0, np.int64), *(index for _, _, index in entries)])
    entry = np.repeat(np.arange(len(entries)), [len(index) for _, _, index in entries])
    domain, label = rows.domain[indices], rows.y[indices]
    right = label if expected is None else np.concatenate([np.empty(0, np.int64), *expected])
    correct, correct_own = predictions == right, own_predictions == right
    cells, cell = np.unique(entry * width + domain, return_inverse=True)
    by_cell = [np.bincount(cell, weights, len(cells)) for weights in (correct, None, correct_own)]
    keys = np.array([(client, SPLITS.index(split)) for client, split, _ in entries], np.int64).reshape(-1, 2)
    client, split = keys[cells // width].T
    scores = np.column_stack([client, cells % width, split, *by_cell]).astype(np.int32)

    split = keys[entry, 1]
    group = np.where(split == SPLITS.index("new"), GROUPS.index("new"), np.isin(domain, list(held_out)))
    test = np.isin(split, [SPLITS.index(name) for name in ("test", "new")])
    group, label, predictions, correct = group[test], label[test], predictions[test], correct[test]
    indices = indices[test]
    confidence = confidence[test].astype(np.float64)
    labels = _by_label(group, predictions, label, (len(GROUPS), classes))
    if rows.group is not None:
        own = group == GROUPS.index("own")
        shape = len(rows.groups), classes
        labels = np.concatenate([labels, _by_label(rows.group[indices[own]], predictions[own], label[own], shape)])
    size = len(GROUPS) * BINS
    bin = group * BINS + np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    bins = [np.bincount(bin, correct, size), np.bincount(bin, minlength=size)]
    return Counts(
        scores,
        labels,
        np.stack(bins, axis=-1).astype(np.int64).reshape(len(GROUPS), BINS, 2),
        np.bincount(bin, confidence, size).reshape(len(GROUPS), BINS),
    )


def _by_label(group: np.ndarray, predictions: np.ndarray, label: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(groups, C, 3) int64, as `Counts.labels`, of rows with these groups, predictions and classes, (n,) each."""
    predicted, true, size = group * shape[1] + predictions, group * shape[1] + label, shape[0] * shape[1]
    counts = np.bincount(predicted, predictions == label, size), np.bincount(predicted, minlength=size)
    return np.stack([*counts, np.bincount(true, minlength=size)], axis=-1).astype(np.int64).reshape(*shape, 3)


def merge(parts: Iterable[Counts]) -> Counts:
    """Counts of one or more chunks of clients together, in their order."""
    parts = list(parts)

    def total(name: str) -> np.ndarray:
        return reduce(np.add, [getattr(part, name) for part in parts])

    return Counts(np.concatenate([part.scores for part in parts]), total("labels"), total("bins"), total("confidence"))
