"""One client per visual domain, or several that share a domain's rows evenly.

Source: FedCLIP, Lu et al. 2023, arXiv 2302.13485: every source domain is one client.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import FixedPartition
from fedsim.registry import component


@component
class ByDomain(FixedPartition):
    """Each client has one domain. With `clients` a multiple of the domains, each domain is split at random."""

    def split(self, labels, domains, clients, rng):
        present = np.unique(domains)
        per_domain, left = divmod(clients or len(present), len(present))
        if left or not per_domain:
            raise InputError(
                f"partition by_domain needs a multiple of the {len(present)} training domains, not {clients} clients"
            )
        parts = []
        for domain in present:
            rows = np.flatnonzero(domains == domain)
            if per_domain > len(rows):
                raise InputError(f"{per_domain} clients for the {len(rows)} rows of a domain; use fewer clients")
            parts += [rows] if per_domain == 1 else np.array_split(rng.permutation(rows), per_domain)
        return parts
