"""Pathological label skew: every class goes to one client.

Source: the few-shot protocol of PromptFL, Guo et al. 2022, arXiv 2208.11625, and of many papers since, whose clients
hold disjoint classes.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import FixedPartition, require_clients
from fedsim.registry import component


@component
class Classes(FixedPartition):
    """Classes are shuffled and split evenly among clients; the first clients have one more if they do not divide."""

    def split(self, labels, domains, clients, rng):
        count, present = require_clients(clients, len(labels), "classes"), np.unique(labels)
        if count > len(present):
            raise InputError(
                f"{count} clients for {len(present)} classes; partition classes gives each class to one client"
            )
        groups = np.array_split(rng.permutation(present), count)
        return [np.flatnonzero(np.isin(labels, group)) for group in groups]
