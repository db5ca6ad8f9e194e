"""Glyphs: small pictures that come with fedsim, so that the first run needs no download.

Source: ours, from fonts and icon sets under free licences; see fedsim/assets/glyphs.
"""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fedsim.datasets import TEST, TRAIN, Dataset, Images
from fedsim.errors import InputError
from fedsim.registry import component

SPLITS = {"train": TRAIN, "test": TEST}


@component
class Glyphs(Dataset):
    """The embedded images. No drawing of a concept that TEST rows show is among the TRAIN rows."""

    def load(self, root: Path | None) -> Images:
        if root is not None:
            raise InputError(f"data set glyphs is embedded and takes no --data-dir, but {root} was given")
        table = pq.read_table(files("fedsim") / "assets" / "glyphs" / "glyphs.parquet")
        label, domain, source, split = (table[name].to_pylist() for name in ("label", "domain", "source", "split"))
        classes, domains = sorted(set(label)), sorted(set(domain))
        return Images(
            files=table["image"].to_pylist(),
            names=[f"{d}/{c}/{s}" for d, c, s in zip(domain, label, source, strict=True)],
            y=np.array([classes.index(name) for name in label], np.int64),
            domain=np.array([domains.index(name) for name in domain], np.int64),
            classes=tuple(classes),
            domains=tuple(domains),
            split=np.array([SPLITS[name] for name in split], np.int8),
            unseen_test=True,
        )
