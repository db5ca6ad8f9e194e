"""PACS: 9,991 photos, paintings, cartoons and sketches of 7 things.

Source: Li et al. 2017, "Deeper, broader and artier domain generalization", arXiv 1710.03077. Layouts: the
authors' archive (`kfold/`), DomainBed (`PACS/`), Dassl (`pacs/images/` next to `pacs/splits/`).
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from fedsim.datasets import TRAIN, VAL, FixedDataset, Images
from fedsim.datasets._tree import Part, apply_lists, checked, find_domains, list_tree
from fedsim.registry import component

DOMAINS = {"art_painting": ["art"], "cartoon": [], "photo": [], "sketch": []}

# No test lists: the authors' `*_test_kfold.txt` are the other two together, for a domain that is held out.
LISTS = {"{}_train_kfold.txt": TRAIN, "{}_crossval_kfold.txt": VAL}


@component
class PACS(FixedDataset):
    """Domains `art_painting`, `cartoon`, `photo`, `sketch`, at most two folders below `--data-dir`.

    Attributes:
        split: "own" reads the authors' `{domain}_train_kfold.txt` and `{domain}_crossval_kfold.txt`, and
            leaves training clients without test rows; "seeded" leaves the split to the partition's seed.
    """

    split: Literal["own", "seeded"] = Field(
        "seeded",
        description="seeded: by the partition's seed; own: by the set's {domain}_*_kfold.txt",
    )

    def read(self, root: Path | None) -> Images:
        root = checked(root, "pacs")
        base, domains = find_domains(root, DOMAINS)
        images = list_tree(base, [Part(domain, folder) for domain, folder in domains.items()])
        return apply_lists(images, root, base, LISTS) if self.split == "own" else images
