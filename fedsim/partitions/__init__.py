"""Partitions: how the rows of the training domains go to clients.

Partitions have a separate seed (`--partition-seed`), so the spread over partitions and the spread over training runs
can be measured separately.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from fedsim.datasets import TEST, TRAIN, UNASSIGNED, VAL, Labels
from fedsim.errors import InputError
from fedsim.registry import name_of
from fedsim.rng import numpy_rng
from fedsim.shares import decimal, part

Splits = tuple[np.ndarray, np.ndarray, np.ndarray]  # a client's train, validation and test rows, ascending


class Partition(ABC):
    """Assigns rows to clients. Subclasses are components; most derive from `FixedPartition`."""

    @abstractmethod
    def assign(
        self, rows: Labels, domains: list[int], clients: int | None, seed: int, train_share: float
    ) -> Sequence[Splits]:
        """The rows of each training client; a client may be drawn only when it is accessed.

        Args:
            domains: indices of the domains that clients train on.
            clients: number of clients, or None for the partition's natural number.
            train_share: fraction of a client's rows used for training; validation and test get half of the rest each.

        Raises:
            InputError: the partition does not support that number of clients or this data set.
        """

    def images(self, rows: Labels, splits: Sequence[Splits], seed: int) -> np.ndarray | None:
        """(N,) the row whose image each row shows instead of its own; None: every row shows its own.

        Args:
            splits: what `assign` returned.
        """
        return None

    def held_out(self, rows: Labels, domain: int) -> np.ndarray:
        """The test rows of a held-out domain: all, or the set's own where they differ from the others in kind."""
        own = (rows.domain == domain) & (rows.split == TEST)
        only_own = rows.unseen_test or (rows.class_domain and own.any())
        return np.flatnonzero(own if only_own else rows.domain == domain)


class FixedPartition(Partition):
    """Assigns each row of a fixed data set to at most one client."""

    def assign(self, rows, domains, clients, seed, train_share):
        require_fixed(rows, self)
        candidates = np.flatnonzero(np.isin(rows.domain, domains))
        parts = self.split(rows.y[candidates], rows.domain[candidates], clients, numpy_rng(seed, "partition"))
        return [
            cut(rows, np.sort(candidates[part]), train_share, numpy_rng(seed, "split", client))
            for client, part in enumerate(parts)
        ]

    @abstractmethod
    def split(
        self, labels: np.ndarray, domains: np.ndarray, clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """Splits n rows among K clients; no row goes to two clients.

        Args:
            labels: (n,) class of each row.
            domains: (n,) domain of each row.
            clients: K, or None for the partition's natural number.

        Returns:
            K arrays of positions in [0, n).

        Raises:
            InputError: K does not fit the rows; the message says which numbers do.
        """


def cut(rows: Labels, selected: np.ndarray, train_share: float, rng: np.random.Generator) -> Splits:
    """Cuts selected rows into train, validation and test rows.

    Splits that the data set defines are kept. The other rows are shuffled and cut 60/20/20, if `train_share` is 0.6, as
    in FedCLIP's code, which floors each share and drops the remainder.
    """
    split = rows.split[selected]
    is_drawn, own_test = drawn(rows)[selected], bool((rows.split == TEST).any())
    free = rng.permutation(selected[is_drawn])
    other_share = (1 - train_share) / 2
    if own_test:
        # In floats, as in earlier versions: they decide how a half is rounded, and no row is lost either way.
        train = round(len(free) * train_share / (train_share + other_share))
        val, test = len(free) - train, 0
    else:
        train = part(len(free), train_share)
        val = test = int(len(free) * (1 - decimal(train_share)) / 2)
    shuffled = np.split(free, [train, train + val, train + val + test])
    fixed = selected[(split == TRAIN) & ~is_drawn], selected[split == VAL], selected[split == TEST]
    first, second, third = (np.sort(np.concatenate(pair)) for pair in zip(fixed, shuffled, strict=False))
    return first, second, third


def drawn(rows: Labels) -> np.ndarray:
    """(n,) bool, the rows whose split is drawn; (1,) for data sets that generate rows on demand."""
    # Where a data set, or one of a suite, defines only train and test rows, its train rows are cut.
    own_val = rows.split == VAL
    own_val = np.isin(rows.domain, rows.domain[own_val]) if rows.class_domain else own_val.any()
    return (rows.split == UNASSIGNED) | ((rows.split == TRAIN) & ~own_val)


def sizes(rows: int, train_share: float) -> tuple[int, int, int]:
    """Numbers of train, validation and test rows of a client with this many rows."""
    train = part(rows, train_share)
    other = (rows - train) // 2
    return train, other, other


def require_fixed(rows: Labels, partition: Partition) -> None:
    """Raises InputError for a data set that generates rows on demand."""
    if rows.rows_per_client:
        raise InputError(
            f"partition {name_of(partition)} needs a finite data set; this one generates rows on demand: "
            "use --partition natural"
        )


def require_clients(clients: int | None, rows: int, name: str) -> int:
    """The number of clients, for a partition without a natural one."""
    if clients is None:
        raise InputError(f"partition {name} needs --clients N, a number of clients from 1 to {rows}")
    if clients > rows:
        raise InputError(f"{clients} clients for {rows} rows; at most one client per row is possible")
    return clients


def split_by_shares(groups: list[np.ndarray], shares: np.ndarray) -> list[np.ndarray]:
    """Splits each of G groups of positions among K clients in the proportions of `shares`, (G, K)."""
    pieces: list[list[np.ndarray]] = [[] for _ in range(shares.shape[1])]
    for group, share in zip(groups, shares, strict=True):
        cuts = (np.cumsum(share)[:-1] * len(group)).round().astype(int)
        for rows, piece in zip(pieces, np.split(group, cuts), strict=True):
            rows.append(piece)
    return [np.concatenate(rows) for rows in pieces]


def draw_until(least: int, draw, attempts: int = 200) -> list[np.ndarray]:
    """Draws again until every client has `least` rows, as NIID-Bench does (Li et al. 2022, arXiv 2102.02079).

    Raises:
        InputError: none of `attempts` draws gave every client that many.
    """
    for _ in range(attempts):
        parts = draw()
        smallest = min(map(len, parts))
        if smallest >= least:
            return parts
    raise InputError(
        f"{attempts} draws left some client with fewer than {least} rows (the last one: {smallest}); "
        "use fewer clients, a larger alpha, or a smaller min_rows"
    )
