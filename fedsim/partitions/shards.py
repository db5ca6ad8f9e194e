"""Pathological label skew: rows sorted by class, cut into shards, a few shards to each client.

Source: McMahan et al. 2017, arXiv 1602.05629, section 3 (200 shards of 300, two to a client).
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import Partition, wanted
from fedsim.registry import component
from fedsim.search_space import Field, Linear


@component
class Shards(Partition):
    """A client sees about `per_client` classes."""

    per_client: int = Field(2, ge=1, search=Linear(1, 5), description="shards that each client gets")

    def split(self, labels, domains, clients, rng):
        count = wanted(clients, len(labels), "shards")
        if count * self.per_client > len(labels):
            raise InputError(f"{count * self.per_client} shards for {len(labels)} rows; take fewer clients or shards")
        # Shuffled first: rows of one class are otherwise in the order of their domains.
        shuffled = rng.permutation(len(labels))
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        shards = np.array_split(by_class, count * self.per_client)
        deal = rng.permutation(len(shards)).reshape(count, self.per_client)
        return [np.concatenate([shards[index] for index in hand]) for hand in deal]
