"""Label skew: each class goes to clients in proportions drawn from a Dirichlet distribution.

Source: Hsu et al. 2019, arXiv 1909.06335, drawn class by class as in Yurochkin et al. 2019, arXiv 1905.12022.
"""

import numpy as np

from fedsim.partitions import FixedPartition, draw_until, require_clients, split_by_shares
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class Dirichlet(FixedPartition):
    """The smaller alpha is, the fewer classes a client has."""

    alpha: float = Field(0.5, gt=0, search=Log(0.05, 10.0), description="concentration of the proportions")
    min_rows: int = Field(10, ge=1, description="smallest number of rows of a client; draws with fewer are repeated")

    def split(self, labels, domains, clients, rng):
        count = require_clients(clients, len(labels), "dirichlet")

        def draw():
            groups = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
            return split_by_shares(groups, rng.dirichlet(np.full(count, self.alpha), size=len(groups)))

        return draw_until(self.min_rows, draw)
