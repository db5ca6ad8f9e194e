"""Class imbalance: the number of rows falls exponentially from the first class to the last, then label skew.

Source: the long-tailed CIFAR of Cao et al. 2019, "Learning imbalanced datasets with label-distribution-aware margin
loss", arXiv 1906.07413; shared among clients as in `dirichlet`.
"""

import numpy as np

from fedsim.partitions import FixedPartition, require_clients
from fedsim.partitions.dirichlet import Dirichlet
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class LongTail(FixedPartition):
    """Class c of C has n * factor ** (-c / (C - 1)) rows, and at least 1, where n is the size of the largest class.

    A smaller class keeps the rows it has. The other rows are not used. Test rows of clients follow the same numbers;
    held-out domains stay whole.
    """

    factor: float = Field(100.0, ge=1, le=1e6, description="rows of the first class, for each row of the last")
    alpha: float = Field(0.5, gt=0, search=Log(0.05, 10.0), description="concentration of the proportions of clients")
    min_rows: int = Field(2, ge=1, description="smallest number of rows of a client; draws with fewer are repeated")

    def split(self, labels, domains, clients, rng):
        require_clients(clients, len(labels), "long_tail")
        present, counts = np.unique(labels, return_counts=True)
        steps = np.arange(len(present)) / max(1, len(present) - 1)
        # Rounded down, as in the authors' code; the small number keeps exact powers from falling below their value.
        sizes = np.maximum(1, (counts.max() * self.factor**-steps + 1e-9).astype(int))
        groups = [rng.permutation(np.flatnonzero(labels == label)) for label in present]
        tail = np.sort(np.concatenate([rows[:size] for rows, size in zip(groups, sizes, strict=True)]))
        skew = Dirichlet(alpha=self.alpha, min_rows=self.min_rows)
        return [tail[part] for part in skew.split(labels[tail], domains[tail], clients, rng)]
