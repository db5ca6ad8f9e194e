"""DomainNet: about 0.6 million images of 345 things in 6 styles.

Source: Peng et al. 2019, "Moment matching for multi-source domain adaptation", arXiv 1812.01754. Layouts:
the authors' archives unpacked side by side, DomainBed (`domain_net/`), Dassl (`domainnet/` with `splits/`).
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from fedsim.datasets import TEST, TRAIN, FixedDataset, Images
from fedsim.datasets._tree import Part, apply_lists, checked, find_domains, list_tree
from fedsim.registry import component

DOMAINS = {"clipart": [], "infograph": [], "painting": [], "quickdraw": [], "real": [], "sketch": []}
LISTS = {"{}_train.txt": TRAIN, "{}_test.txt": TEST}


@component
class DomainNet(FixedDataset):
    """Domains `clipart`, `infograph`, `painting`, `quickdraw`, `real`, `sketch`.

    They are at most two folders below `--data-dir`.

    Attributes:
        split: "own" reads the authors' `{domain}_train.txt` and `{domain}_test.txt` (of the cleaned
            version, `painting_train.txt` lacks the class t-shirt); "seeded" splits by the partition's seed.
    """

    split: Literal["own", "seeded"] = Field(
        "seeded", description="seeded: by the partition's seed; own: the set's {domain}_train.txt and {domain}_test.txt"
    )

    def read(self, root: Path | None) -> Images:
        root = checked(root, "domainnet")
        base, domains = find_domains(root, DOMAINS)
        images = list_tree(base, [Part(domain, folder) for domain, folder in domains.items()])
        return apply_lists(images, root, base, LISTS) if self.split == "own" else images
