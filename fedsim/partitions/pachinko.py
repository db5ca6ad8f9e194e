"""Pachinko allocation: label skew in two levels, first over coarse labels, then over the classes of each.

Source: the CIFAR-100 of Reddi et al. 2020, "Adaptive federated optimization", arXiv 2003.00295, as the documentation of
TensorFlow Federated describes it (tff.simulation.datasets.cifar100.load_data), whose parameters are the defaults; the
code was not checked.
"""

import numpy as np

from fedsim.partitions import FixedPartition, require_clients
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class Pachinko(FixedPartition):
    """Domains are the coarse labels, such as the superclasses of CIFAR-100 or the data sets of a suite.

    Each client draws proportions of the domains, and of the classes in each, then its rows one by one without
    replacement: a domain, one of its classes, a row. What is used up is left out, and the others keep their
    proportions. All clients have the same number of rows, up to one. For CIFAR-100: `--dataset huggingface
    --dataset.hub uoft-cs/cifar100 --dataset.image img --dataset.label fine_label --dataset.domain coarse_label
    --dataset.absent-classes true`.
    """

    alpha: float = Field(0.1, gt=0, search=Log(0.01, 10.0), description="concentration of the proportions of domains")
    beta: float = Field(10.0, gt=0, search=Log(0.1, 100.0), description="the same of the classes within a domain")

    def split(self, labels, domains, clients, rng):
        count = require_clients(clients, len(labels), "pachinko")
        cells = [
            [
                rng.permutation(np.flatnonzero((domains == domain) & (labels == label))).tolist()
                for label in np.unique(labels)
            ]
            for domain in np.unique(domains)
        ]
        left = np.array([[len(rows) for rows in classes] for classes in cells])
        sizes = [len(part) for part in np.array_split(labels, count)]
        return [self._draw_rows(size, cells, left, rng) for size in sizes]

    def _draw_rows(
        self, size: int, cells: list[list[list[int]]], left: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """The rows of a client, which are removed.

        Args:
            cells: the rows by domain and class.
            left: (domains, classes) their numbers.
        """
        coarse = rng.dirichlet(np.full(len(left), self.alpha))
        fine = rng.dirichlet(np.full(left.shape[1], self.beta), size=len(left))
        rows = []
        for _ in range(size):
            domain = _draw(coarse, left.sum(axis=1) > 0, rng)
            label = _draw(fine[domain], left[domain] > 0, rng)
            left[domain, label] -= 1
            rows.append(cells[domain][label].pop())
        return np.array(rows)


def _draw(shares: np.ndarray, available: np.ndarray, rng: np.random.Generator) -> int:
    """An index of what is available, in proportion to the shares."""
    ends = np.cumsum(shares * available)
    if not ends[-1]:  # shares of a small concentration are rounded to 0
        ends = np.cumsum(available.astype(float))
    return int(np.searchsorted(ends / ends[-1], rng.random(), side="right"))
