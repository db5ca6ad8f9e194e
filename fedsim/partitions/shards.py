"""Pathological label skew: rows sorted by class, cut into shards, a few shards to each client.

Source: McMahan et al. 2017, arXiv 1602.05629, section 3 (200 shards of 300, two to a client).
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import FixedPartition, require_clients
from fedsim.registry import component
from fedsim.search_space import Field, Linear


@component
class Shards(FixedPartition):
    """A client has about `per_client` classes."""

    per_client: int = Field(2, ge=1, search=Linear(1, 5), description="shards per client")

    def split(self, labels, domains, clients, rng):
        count = require_clients(clients, len(labels), "shards")
        if count * self.per_client > len(labels):
            raise InputError(f"{count * self.per_client} shards for {len(labels)} rows; use fewer clients or shards")
        # Shuffled first, since the rows of a class are in the order of their domains.
        shuffled = rng.permutation(len(labels))
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        shards = np.array_split(by_class, count * self.per_client)
        order = rng.permutation(len(shards)).reshape(count, self.per_client)
        return [np.concatenate([shards[index] for index in group]) for group in order]
