"""One client per visual domain, or several that share a domain's rows evenly.

Source: FedCLIP, Lu et al. 2023, arXiv 2302.13485: every source domain is one client.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import Partition
from fedsim.registry import component


@component
class ByDomain(Partition):
    """Clients are domains; with `clients` a multiple of the domains, each domain is dealt at random."""

    def split(self, labels, domains, clients, rng):
        present = np.unique(domains)
        per_domain, left = divmod(clients or len(present), len(present))
        if left or not per_domain:
            raise InputError(
                f"partition by_domain wants a multiple of the {len(present)} training domains, not {clients} clients"
            )
        dealt = []
        for domain in present:
            rows = np.flatnonzero(domains == domain)
            if per_domain > len(rows):
                raise InputError(f"{per_domain} clients for the {len(rows)} rows of a domain; take fewer clients")
            dealt += [rows] if per_domain == 1 else np.array_split(rng.permutation(rows), per_domain)
        return dealt
