"""VLCS: photos of 5 things from four older data sets, which differ in how they were collected.

Source: Fang et al. 2013, "Unbiased metric learning", ICCV. Layouts: the archive that JigenDG and Dassl use
(`VLCS/CALTECH/train/0/`), DomainBed (`VLCS/Caltech101/bird/`).
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from fedsim.datasets import TEST, TRAIN, UNASSIGNED, VAL, FixedDataset, Images
from fedsim.datasets._tree import Part, checked, find_domains, list_tree
from fedsim.datasets._walk import folders
from fedsim.errors import InputError, listing
from fedsim.registry import component

DOMAINS = {"Caltech101": ["CALTECH"], "LabelMe": [], "SUN09": ["SUN"], "VOC2007": ["PASCAL", "VOC"]}
CLASSES = {"0": "bird", "1": "car", "2": "chair", "3": "dog", "4": "person"}

# Disjoint: in JigenDG's lists Caltech has 891 + 100 + 424 images, and `full` repeats some of them.
SPLITS = {"train": TRAIN, "crossval": VAL, "test": TEST}


@component
class VLCS(FixedDataset):
    """Domains `Caltech101`, `LabelMe`, `SUN09`, `VOC2007` (or `CALTECH`, `LABELME`, `SUN`, `PASCAL`).

    They are at most two folders below `--data-dir`. A domain holds class folders, or the folders `train`,
    `crossval`, `test` of class folders, or only `full`; a class folder has a name, or a number from 0 to 4.

    Attributes:
        split: "own" takes `train`, `crossval`, `test` as they are; "seeded" splits by the partition's seed.
    """

    split: Literal["own", "seeded"] = Field(
        "seeded", description="seeded: by the partition's seed; own: the set's folders train, crossval and test"
    )

    def read(self, root: Path | None) -> Images:
        base, domains = find_domains(checked(root, "vlcs"), DOMAINS)
        parts = [part for domain, folder in domains.items() for part in self._parts(domain, folder)]
        numbers = {folder.name for part in parts for folder in folders(part.folder) if folder.name.isdecimal()}
        if unknown := sorted(numbers - CLASSES.keys()):
            raise InputError(f"class folders in {base} have a name, or a number from 0 to 4; not: {listing(unknown)}")
        return list_tree(base, parts, CLASSES)

    def _parts(self, domain: str, folder: Path) -> list[Part]:
        inside = {sub.name: sub for sub in folders(folder)}
        known = {"full", *SPLITS}
        if (others := inside.keys() - known) and (levels := known & inside.keys()):
            raise InputError(
                f"{folder} has the folders of a split, {listing(sorted(levels))}, and next to them others, which "
                f"would not be read: {listing(sorted(others))}"
            )
        if self.split == "seeded" and not SPLITS.keys() & inside.keys():
            return [Part(domain, inside.get("full", folder))]
        if absent := [name for name in SPLITS if name not in inside]:
            raise InputError(
                f"expected the split folders {listing(SPLITS)} in {folder}; it lacks {listing(absent)} "
                f"and has: {listing(inside) or 'no folders'}"
            )
        return [
            Part(domain, inside[name], code if self.split == "own" else UNASSIGNED) for name, code in SPLITS.items()
        ]
