"""Several clients per domain, with label skew inside each domain.

Source: the Dirichlet partition of Hsu et al. 2019, arXiv 1909.06335, applied to each domain separately.

`scramble_labels` replays a slip in the code of published label-shift tables on DomainNet and Office-Caltech10, so that
these can be understood. Read: utils/data_utils.py of FedOTP, HongxiaLee/FedOTP, commit 506d68c. Its classes
DomainNetDataset_sub and OfficeDataset_sub select the labels of a client's rows from those of the domain, but not the
paths: a client with n rows has the first n images of the domain's list, next to the labels of n other rows in random
order. This happens to the train list and to the test list alike; the clients of a domain share its first images.

Unread: the order of the lists, files that the code of FedBN (med-air/FedBN) provides. Its federated/fed_domainnet.py,
commit 655f5f3, trains on the first rows of a list and validates on the last, so the order is taken to be random.
Differs: the lists of a domain are the train, validation and test rows that its clients have, in an order that is drawn;
their code has no validation rows. It draws the proportions of every class after `np.random.seed(0)`, so that its
partition is the same in every run, and gives a client with its share of the rows no further classes; here they follow
from the partition's seed, without that limit.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import FixedPartition, Splits, require_clients
from fedsim.partitions.dirichlet import Dirichlet
from fedsim.registry import component
from fedsim.rng import numpy_rng
from fedsim.search_space import Field, Log


@component
class DomainDirichlet(FixedPartition):
    """Feature skew and label skew at once: a client has one domain and few of its classes."""

    alpha: float = Field(0.5, gt=0, search=Log(0.05, 10.0), description="concentration of the proportions")
    min_rows: int = Field(10, ge=1, description="smallest number of rows of a client; draws with fewer are repeated")
    scramble_labels: bool = Field(
        False, description="give the rows of clients the images of other rows, as the code of published tables does"
    )

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

    def images(self, rows, splits, seed):
        if not self.scramble_labels:
            return None
        rng, images = numpy_rng(seed, "scramble"), np.arange(len(rows))
        by_domain: dict[int, list[Splits]] = {}
        for split in splits:
            by_domain.setdefault(int(rows.domain[split[0][0]]), []).append(split)
        for clients in by_domain.values():
            for lists in zip(*clients, strict=True):  # the train rows of each client, then validation, then test rows
                listed = rng.permutation(np.concatenate(lists))
                for own in lists:
                    images[rng.permutation(own)] = listed[: len(own)]
        return images
