"""Rows drawn with replacement: any number of clients from any number of rows.

Source: ours; drawing with replacement is the bootstrap of Efron 1979, the label skew that of Hsu et al. 2019, arXiv
1909.06335.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import Partition, Splits, cut, require_fixed, sizes
from fedsim.registry import component
from fedsim.rng import numpy_rng
from fedsim.search_space import Field, Log


@component
class Bootstrap(Partition):
    """Rows are split once for all clients, so no client trains on a test row of another."""

    rows: int = Field(100, ge=2, le=2**20, description="rows of a client, of all splits together")
    by_domain: bool = Field(True, description="each client has rows of one domain, clients cycle through the domains")
    alpha: float | None = Field(
        None,
        gt=0,
        search=Log(0.05, 10.0),
        description="Dirichlet concentration of each client's classes; smaller is more skewed (default: no skew)",
    )

    def assign(self, rows, domains, clients, seed, train_share):
        require_fixed(rows, self)
        if clients is None:
            raise InputError("partition bootstrap needs --clients N, a number of clients >= 1")
        counts = sizes(self.rows, train_share)
        if not counts[0]:
            raise InputError(f"a train share of {train_share:g} of {self.rows} rows leaves no client a train row")
        homes = [
            cut(rows, np.flatnonzero(rows.domain == domain), train_share, numpy_rng(seed, "split", domain))
            for domain in domains
        ]
        if not self.by_domain:  # domains are still cut one by one, so a row's split does not depend on this field
            homes = [tuple(np.concatenate(parts) for parts in zip(*homes, strict=True))]
        for domain, (train, _, _) in zip(domains, homes, strict=False):
            if not len(train):
                raise InputError(f"domain {rows.domains[domain]} has no train rows to draw from")

        def pool(part: np.ndarray) -> _Pool:
            return _Pool.of(part, rows.y, len(rows.classes))

        pools = tuple((pool(train), pool(val), pool(test)) for train, val, test in homes)
        return _Drawn(clients, pools, counts, self.alpha, seed)


@dataclass(frozen=True)
class _Pool:
    """Rows to draw from, class by class.

    Attributes:
        rows: (n,) sorted by class; class c has `counts[c]` of them, from position `starts[c]`.
    """

    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, y: np.ndarray, classes: int) -> "_Pool":
        counts = np.bincount(y[rows], minlength=classes)
        return cls(rows[np.argsort(y[rows], kind="stable")], np.cumsum(counts) - counts, counts)

    def draw(self, count: int, skew: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Ascending rows, with replacement; `skew` multiplies the share of each class."""
        shares = self.counts * skew
        if not shares.sum():
            return np.empty(0, np.int64)
        labels = rng.choice(len(shares), count, p=shares / shares.sum())
        return np.sort(self.rows[self.starts[labels] + rng.integers(self.counts[labels])])


@dataclass(frozen=True)
class _Drawn(Sequence):
    """Client k is drawn with the seed of its number, so the order of access does not matter."""

    clients: int
    pools: tuple[tuple[_Pool, _Pool, _Pool], ...]
    sizes: tuple[int, int, int]
    alpha: float | None
    seed: int

    def __len__(self) -> int:
        return self.clients

    def __getitem__(self, client: int) -> Splits:
        rng = numpy_rng(self.seed, "partition", client)
        pools = self.pools[client % len(self.pools)]
        counts = pools[0].counts  # train rows of each class
        skew = np.ones(len(counts))
        if self.alpha is not None:
            # Shares of the classes that have rows, whatever their numbers of rows.
            shares = np.zeros(len(counts))
            shares[counts > 0] = rng.dirichlet(np.full(np.count_nonzero(counts), self.alpha))
            skew = shares / np.maximum(1, counts)
        first, second, third = (pool.draw(size, skew, rng) for pool, size in zip(pools, self.sizes, strict=True))
        return first, second, third
