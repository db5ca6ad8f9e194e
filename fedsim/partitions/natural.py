"""Clients as the data set has them: one for each owner of rows, or as many as are asked for of generated data.

Source: LEAF, Caldas et al. 2018, arXiv 1812.01097, whose clients are the writers, users and speakers of the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from fedsim.datasets import Labels
from fedsim.errors import InputError, counted
from fedsim.partitions import Partition, Splits, cut, sizes
from fedsim.registry import component
from fedsim.rng import numpy_rng
from fedsim.search_space import Field, Linear
from fedsim.shares import decimal, part

HELD_OUT_CLIENTS = 16  # a held-out domain has as many test rows as this many clients have rows


@component
class Natural(Partition):
    """Needs owners of rows, such as the column `owner` of `features.parquet`; an owner becomes a client.

    Or a data set that generates clients on demand, such as synthetic, and --clients N.
    """

    min_rows: int = Field(1, ge=1, description="owners with fewer rows in the training domains are left out")
    rows_sigma: float = Field(
        0.0,
        ge=0,
        le=5,
        search=Linear(0.0, 2.0),
        description="of generated clients: spread of the logarithm of the number of rows; 0: equal numbers, else fewer",
    )

    def assign(self, rows, domains, clients, seed, train_share):
        if rows.owner is not None:
            return self._by_owner(rows, rows.owner, domains, clients, seed, train_share)
        if not rows.rows_per_client:
            raise InputError(
                "partition natural needs a data set whose rows have owners, such as a column owner of "
                "features.parquet, or one that generates clients, such as synthetic; use bootstrap"
            )
        if self.min_rows > 1:
            raise InputError("--partition.min-rows has no effect on a data set that generates clients; leave it out")
        if clients is None:
            raise InputError("partition natural needs --clients N, a number of clients >= 1")
        if not part(rows.rows_per_client, train_share):
            raise InputError(
                f"a train share of {train_share:g} of {rows.rows_per_client} rows leaves no client a train row"
            )
        return _Generated(
            clients, rows.rows_per_client, tuple(domains), len(rows.domains), seed, train_share, self.rows_sigma
        )

    def _by_owner(
        self, rows: Labels, owner: np.ndarray, domains: list[int], clients: int | None, seed: int, train_share: float
    ) -> list[Splits]:
        """The rows of each owner in the training domains, in the order of the owners."""
        if self.rows_sigma:
            raise InputError("--partition.rows-sigma has no effect on rows with owners; leave it out")
        candidates = np.flatnonzero(np.isin(rows.domain, domains))
        by_owner = candidates[np.argsort(owner[candidates], kind="stable")]
        owned = np.split(by_owner, np.flatnonzero(np.diff(owner[by_owner])) + 1)
        enough = [each for each in owned if len(each) >= self.min_rows]
        if not enough:
            raise InputError(
                f"no owner has {self.min_rows} rows in the training domains; the most: {max(map(len, owned))}"
            )
        if clients not in (None, len(enough)):
            raise InputError(f"partition natural has {len(enough)} clients here, one per owner; leave --clients out")
        splits = [cut(rows, each, train_share, numpy_rng(seed, "split", k)) for k, each in enumerate(enough)]
        if idle := [len(each) for each, (train, _, _) in zip(enough, splits, strict=True) if not len(train)]:
            raise InputError(
                f"{len(idle)} of {len(enough)} owners, with {counted(max(idle), 'row')} at most, have no train rows; "
                "--partition.min-rows N leaves out owners with fewer than N rows"
            )
        return splits

    def held_out(self, rows, domain):
        if not rows.rows_per_client:
            return super().held_out(rows, domain)
        blocks = domain + len(rows.domains) * np.arange(HELD_OUT_CLIENTS)
        return (blocks[:, None] * rows.rows_per_client + np.arange(rows.rows_per_client)).ravel()


@dataclass(frozen=True)
class _Generated(Sequence):
    """Client k has the k-th of the blocks whose domain is trained on; the domain of block b is b modulo `of`.

    Attributes:
        block: rows of a block.
        domains: those that clients train on.
        of: number of all domains.
    """

    clients: int
    block: int
    domains: tuple[int, ...]
    of: int
    seed: int
    train_share: float
    sigma: float

    def __len__(self) -> int:
        return self.clients

    def __getitem__(self, client: int) -> Splits:
        cycle, index = divmod(client, len(self.domains))
        first, rows = (cycle * self.of + self.domains[index]) * self.block, self.block
        if self.sigma:
            # Folded, since a client has at most the generated rows; and each needs at least one train row.
            less = np.exp(-abs(self.sigma * numpy_rng(self.seed, "split", client).standard_normal()))
            rows = max(ceil(1 / decimal(self.train_share)), round(rows * less))
        train, val, test = sizes(rows, self.train_share)
        own = np.arange(first, first + rows)
        return own[:train], own[train : train + val], own[train + val : train + val + test]
