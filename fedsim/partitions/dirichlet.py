"""Label skew: each class goes to clients in proportions drawn from a Dirichlet distribution.

Source: Hsu et al. 2019, arXiv 1909.06335, drawn class by class as in Yurochkin et al. 2019, arXiv 1905.12022.
"""

import numpy as np

from fedsim.partitions import Partition, deal_by_share, until_all_have, wanted
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class Dirichlet(Partition):
    """The smaller alpha, the fewer classes a client sees."""

    alpha: float = Field(0.5, gt=0, search=Log(0.05, 10.0), description="concentration of the proportions")
    min_rows: int = Field(10, ge=1, description="draw again until every client has as many rows")

    def split(self, labels, domains, clients, rng):
        count = wanted(clients, len(labels), "dirichlet")

        def draw():
            groups = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
            return deal_by_share(groups, rng.dirichlet(np.full(count, self.alpha), size=len(groups)))

        return until_all_have(self.min_rows, draw)
