"""Rows assigned at random, in equal numbers.

Source: McMahan et al. 2017, arXiv 1602.05629.
"""

import numpy as np

from fedsim.partitions import FixedPartition, require_clients
from fedsim.registry import component


@component
class Iid(FixedPartition):
    """Every client has the same mixture of classes and domains, up to chance."""

    def split(self, labels, domains, clients, rng):
        return np.array_split(rng.permutation(len(labels)), require_clients(clients, len(labels), "iid"))
