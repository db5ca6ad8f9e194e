"""Each client as the data set made it, however many there are.

Source: ours; data sets whose rows have owners, LEAF's (Caldas et al. 2018, arXiv 1812.01097), are split in this way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from fedsim.errors import InputError
from fedsim.partitions import Dealing, Splits, sizes
from fedsim.registry import component
from fedsim.rng import numpy_rng
from fedsim.search_space import Field, Linear
from fedsim.shares import decimal, part

AWAY = 16  # clients' worth of test rows stand for a domain that nobody trains on


@component
class Natural(Dealing):
    """Wants a data set that makes clients, such as synthetic, and --clients N; no client is made before its turn."""

    rows_sigma: float = Field(
        0.0,
        ge=0,
        le=5,
        search=Linear(0.0, 2.0),
        description="spread of the logarithm of a client's rows; 0: all have as many, else fewer",
    )

    def deal(self, rows, domains, clients, seed, train_share):
        if not rows.rows_per_client:
            raise InputError("partition natural wants a data set that makes clients, such as synthetic; take bootstrap")
        if clients is None:
            raise InputError("partition natural wants --clients N, a number of clients from 1 on")
        if not part(rows.rows_per_client, train_share):
            raise InputError(
                f"a train share of {train_share:g} of {rows.rows_per_client} rows leaves no client a train row"
            )
        return _Owned(
            clients, rows.rows_per_client, tuple(domains), len(rows.domains), seed, train_share, self.rows_sigma
        )

    def away(self, rows, domain):
        blocks = domain + len(rows.domains) * np.arange(AWAY)
        return (blocks[:, None] * rows.rows_per_client + np.arange(rows.rows_per_client)).ravel()


@dataclass(frozen=True)
class _Owned(Sequence):
    """Client k has the k-th of the blocks whose domain is trained on; block b is of domain b modulo their number."""

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
        turn, place = divmod(client, len(self.domains))
        first, rows = (turn * self.of + self.domains[place]) * self.block, self.block
        if self.sigma:
            # Folded, for nobody has more rows than were made; and a client with none to train on is no client.
            less = np.exp(-abs(self.sigma * numpy_rng(self.seed, "split", client).standard_normal()))
            rows = max(ceil(1 / decimal(self.train_share)), round(rows * less))
        train, val, test = sizes(rows, self.train_share)
        mine = np.arange(first, first + rows)
        return mine[:train], mine[train : train + val], mine[train + val : train + val + test]
