"""Glyphs: small pictures that come with fedsim, so that the first run needs no download.

Source: ours, from fonts and icon sets under free licences; see fedsim/assets/glyphs.
"""

from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from fedsim.datasets import TEST, TRAIN, UNASSIGNED, VAL, FixedDataset, Images
from fedsim.errors import InputError
from fedsim.registry import component

VAL_ONE_IN = 4  # of the concepts that are not for testing


@component
class Glyphs(FixedDataset):
    """The embedded images: 15 classes, drawn in 5 styles, which are the domains.

    `split: images` is the protocol of PACS and FedCLIP: known kinds of things, new pictures, an unseen domain. The
    partition's seed splits the rows of each training domain, and all rows of the held-out domain are for testing.

    `split: concepts` is harder: no concept (a kind of drawing, such as "owl") of a TEST or VAL row appears in a TRAIN
    row of any domain, and no TEST concept was seen by the embedded model. Validation rows with known concepts would
    choose the round, and the hyperparameters, that remember drawings best, which is not what these test rows measure.
    """

    split: Literal["images", "concepts"] = Field(
        "images",
        description="images: new pictures of known concepts, by the partition's seed; concepts: test and validation "
        "rows show concepts without train rows",
    )

    def read(self, root: Path | None) -> Images:
        if root is not None:
            raise InputError(f"data set glyphs is embedded and takes no --data-dir, but {root} was given")
        table = pq.read_table(files("fedsim") / "assets" / "glyphs" / "glyphs.parquet")
        columns = "label", "domain", "source", "concept", "split"
        label, domain, source, concept, split = (table[name].to_pylist() for name in columns)
        by_concept = self.split == "concepts"
        classes, domains = sorted(set(label)), sorted(set(domain))
        return Images(
            files=table["image"].to_pylist(),
            names=[f"{d}/{c}/{s}" for d, c, s in zip(domain, label, source, strict=True)],
            y=np.array([classes.index(name) for name in label], np.int64),
            domain=np.array([domains.index(name) for name in domain], np.int64),
            classes=tuple(classes),
            domains=tuple(domains),
            split=_by_concept(label, concept, split) if by_concept else np.full(len(label), UNASSIGNED, np.int8),
            unseen_test=by_concept,
        )


def _by_concept(labels: list[str], concepts: list[str], splits: list[str]) -> np.ndarray:
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
