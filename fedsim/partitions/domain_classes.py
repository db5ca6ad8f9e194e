"""Disjoint classes within each domain: a client has a block of the classes of one domain.

Source: the federation of FedTPG, Qiu et al., ICLR 2024, arXiv 2310.06123, as in federated/server.py of its code,
boschresearch/FedTPG, commit f141c29, where domains are data sets and a client has about 20 classes.
"""

import numpy as np

from fedsim.errors import InputError, counted
from fedsim.partitions import FixedPartition, require_clients
from fedsim.registry import component
from fedsim.search_space import Field

Classes = dict[int, np.ndarray]  # by domain
Blocks = list[tuple[int, np.ndarray]]  # a domain and some of its classes


@component
class DomainClasses(FixedPartition):
    """Blocks are in the order of the labels; nothing is drawn but validation rows where the data set has none.

    With `per_client`, a domain of C classes has C / per_client clients, rounded (halves to even), and one at least; the
    last one has the classes that are left. Otherwise every domain has the same number of clients, which share its
    classes evenly.
    """

    per_client: int | None = Field(
        None, ge=1, description="classes of a client (default: as --clients gives, a multiple of the domains)"
    )

    def split(self, labels, domains, clients, rng):
        present = {domain: np.unique(labels[domains == domain]) for domain in np.unique(domains)}
        blocks = self._sized(present, clients) if self.per_client else _shared(present, clients, len(labels))
        return [np.flatnonzero((domains == domain) & np.isin(labels, block)) for domain, block in blocks]

    def _sized(self, present: Classes, clients: int | None) -> Blocks:
        size, blocks = self.per_client or 1, []
        for domain, classes in present.items():
            starts = range(size, size * max(1, round(len(classes) / size)), size)
            blocks += [(domain, block) for block in np.split(classes, list(starts))]
        if clients not in (None, len(blocks)):
            raise InputError(
                f"--partition.per-client {size} gives {counted(len(blocks), 'client')}, not {clients}; leave one out"
            )
        return blocks


def _shared(present: Classes, clients: int | None, rows: int) -> Blocks:
    count, left = divmod(require_clients(clients, rows, "domain_classes"), len(present))
    fewest = min(map(len, present.values()))
    if left or not 1 <= count <= fewest:
        raise InputError(
            f"partition domain_classes needs a multiple of the {len(present)} training domains, at most "
            f"{fewest * len(present)}, not {clients} clients; or --partition.per-client N"
        )
    return [(domain, block) for domain, classes in present.items() for block in np.array_split(classes, count)]
