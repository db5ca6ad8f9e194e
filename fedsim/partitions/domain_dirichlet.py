"""Several clients per domain, with label skew inside each domain.

Source: the Dirichlet partition of Hsu et al. 2019, arXiv 1909.06335, applied to each domain separately.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import FixedPartition, require_clients
from fedsim.partitions.dirichlet import Dirichlet
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class DomainDirichlet(FixedPartition):
    """Feature skew and label skew at once: a client has one domain and few of its classes."""

    alpha: float = Field(0.5, gt=0, search=Log(0.05, 10.0), description="concentration of the proportions")
    min_rows: int = Field(10, ge=1, description="smallest number of rows of a client; draws with fewer are repeated")

    def split(self, labels, domains, clients, rng):
        present = np.unique(domains)
        per_domain, left = divmod(require_clients(clients, len(labels), "domain_dirichlet"), len(present))
        if left or not per_domain:
            raise InputError(
                f"partition domain_dirichlet needs a multiple of the {len(present)} training domains, "
                f"not {clients} clients"
            )
        skew = Dirichlet(alpha=self.alpha, min_rows=self.min_rows)
        parts = []
        for domain in present:
            rows = np.flatnonzero(domains == domain)
            parts += [rows[part] for part in skew.split(labels[rows], domains[rows], per_domain, rng)]
        return parts
