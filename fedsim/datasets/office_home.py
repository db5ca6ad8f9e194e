"""Office-Home: about 15,500 images of 65 things found in offices and homes, in 4 styles.

Source: Venkateswara et al. 2017, "Deep hashing network for unsupervised domain adaptation", arXiv
1706.07522. Layouts: the authors' `OfficeHomeDataset_10072016/`, DomainBed and Dassl (`office_home/`).
"""

from pathlib import Path

from fedsim.datasets import FixedDataset, Images
from fedsim.datasets._tree import Part, checked, find_domains, list_tree
from fedsim.registry import component

DOMAINS = {"Art": [], "Clipart": [], "Product": [], "Real World": ["Real"]}


@component
class OfficeHome(FixedDataset):
    """Domains `Art`, `Clipart`, `Product`, `Real World` (or `Real_World`, `Real`), any capitals.

    They are at most two folders below `--data-dir`. The authors give no split.
    """

    def read(self, root: Path | None) -> Images:
        base, domains = find_domains(checked(root, "office_home"), DOMAINS)
        return list_tree(base, [Part(domain, folder) for domain, folder in domains.items()])
