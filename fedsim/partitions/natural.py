"""Clients as the data set generates them, in any number.

Source: ours; data sets whose rows have owners, LEAF's (Caldas et al. 2018, arXiv 1812.01097), are split in this way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import Partition, Splits, sizes
from fedsim.registry import component
from fedsim.rng import numpy_rng
from fedsim.search_space import Field, Linear
from fedsim.shares import decimal, part

HELD_OUT_CLIENTS = 16  # a held-out domain has as many test rows as this many clients have rows


@component
class Natural(Partition):
    """Needs a data set that generates clients, such as synthetic, and --clients N; clients are generated on demand."""

    rows_sigma: float = Field(
        0.0,
        ge=0,
        le=5,
        search=Linear(0.0, 2.0),
        description="spread of the logarithm of a client's number of rows; 0: equal numbers, else fewer rows",
    )

    def assign(self, rows, domains, clients, seed, train_share):
        if not rows.rows_per_client:
            raise InputError(
                "partition natural needs a data set that generates clients, such as synthetic; use bootstrap"
            )
        if clients is None:
            raise InputError("partition natural needs --clients N, a number of clients >= 1")
        if not part(rows.rows_per_client, train_share):
            raise InputError(
                f"a train share of {train_share:g} of {rows.rows_per_client} rows leaves no client a train row"
            )
        return _Owned(
            clients, rows.rows_per_client, tuple(domains), len(rows.domains), seed, train_share, self.rows_sigma
        )

    def held_out(self, rows, domain):
        blocks = domain + len(rows.domains) * np.arange(HELD_OUT_CLIENTS)
        return (blocks[:, None] * rows.rows_per_client + np.arange(rows.rows_per_client)).ravel()


@dataclass(frozen=True)
class _Owned(Sequence):
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
