"""Glyphs: small pictures that come with fedsim, so that the first run needs no download.

Source: ours, from fonts and icon sets under free licences; see fedsim/assets/glyphs.
"""

from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fedsim.datasets import TEST, TRAIN, VAL, Dataset, Images
from fedsim.errors import InputError
from fedsim.registry import component

VAL_ONE_IN = 4  # of the concepts that are not for testing


@component
class Glyphs(Dataset):
    """The embedded images, split by concept: no TRAIN row of any domain shows a concept of a TEST or VAL row.

    If validation and train rows shared concepts, the chosen round and hyperparameters would be those that remember
    drawings best, while the test rows measure the opposite.
    """

    def load(self, root: Path | None) -> Images:
        if root is not None:
            raise InputError(f"data set glyphs is embedded and takes no --data-dir, but {root} was given")
        table = pq.read_table(files("fedsim") / "assets" / "glyphs" / "glyphs.parquet")
        columns = "label", "domain", "source", "concept", "split"
        label, domain, source, concept, split = (table[name].to_pylist() for name in columns)
        classes, domains = sorted(set(label)), sorted(set(domain))
        return Images(
            files=table["image"].to_pylist(),
            names=[f"{d}/{c}/{s}" for d, c, s in zip(domain, label, source, strict=True)],
            y=np.array([classes.index(name) for name in label], np.int64),
            domain=np.array([domains.index(name) for name in domain], np.int64),
            classes=tuple(classes),
            domains=tuple(domains),
            split=_splits(label, concept, split),
            unseen_test=True,
        )


def _splits(labels: list[str], concepts: list[str], splits: list[str]) -> np.ndarray:
    """The test rows of the data set; every fourth other concept of each label, in the order of hashes, for VAL."""
    free = {(label, c) for label, c, split in zip(labels, concepts, splits, strict=True) if split != "test"}
    val = set()
    for label in set(labels):
        drawn = sorted((c for other, c in free if other == label), key=lambda c: sha256(c.encode()).digest())
        val |= {(label, c) for c in drawn[::VAL_ONE_IN]}
    kinds = [
        TEST if s == "test" else VAL if (label, c) in val else TRAIN
        for label, c, s in zip(labels, concepts, splits, strict=True)
    ]
    return np.array(kinds, np.int8)
