"""Pathological label skew: every class goes to one client.

Source: the few-shot protocol of PromptFL, Guo et al. 2022, arXiv 2208.11625, and of many papers since, whose clients
hold disjoint classes.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import Partition, wanted
from fedsim.registry import component


@component
class Classes(Partition):
    """Classes are shuffled and dealt in equal numbers; where they do not divide, the first clients have one more."""

    def split(self, labels, domains, clients, rng):
        count, present = wanted(clients, len(labels), "classes"), np.unique(labels)
        if count > len(present):
            raise InputError(f"{count} clients for {len(present)} classes; under partition classes each has its own")
        hands = np.array_split(rng.permutation(present), count)
        return [np.flatnonzero(np.isin(labels, hand)) for hand in hands]
