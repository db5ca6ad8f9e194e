"""Partitions: how the rows of the training domains go to clients.

Every partition draws from a seed of its own (`--partition-seed`), apart from training's, so that the spread
over partitions and the spread over training runs can be told apart.
"""

from abc import ABC, abstractmethod

import numpy as np

from fedsim.errors import InputError


class Partition(ABC):
    """A way to deal rows to clients. Subclasses are components."""

    @abstractmethod
    def split(
        self, labels: np.ndarray, domains: np.ndarray, clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """Deals n rows to K clients; no row goes to two.

        Args:
            labels: (n,) class of each row.
            domains: (n,) domain of each row.
            clients: K, or None for the partition's own natural number.

        Returns:
            K arrays of positions in [0, n).

        Raises:
            InputError: K does not fit the rows; the message says what would.
        """


def wanted(clients: int | None, rows: int, name: str) -> int:
    """The number of clients, where a partition has no natural one."""
    if clients is None:
        raise InputError(f"partition {name} wants --clients N, a number of clients from 1 to {rows}")
    if clients > rows:
        raise InputError(f"{clients} clients for {rows} rows; at most one client per row is possible")
    return clients


def deal_by_share(groups: list[np.ndarray], shares: np.ndarray) -> list[np.ndarray]:
    """Cuts each of G groups of positions among K clients in the proportions of `shares`, (G, K)."""
    dealt: list[list[np.ndarray]] = [[] for _ in range(shares.shape[1])]
    for group, share in zip(groups, shares, strict=True):
        cuts = (np.cumsum(share)[:-1] * len(group)).round().astype(int)
        for rows, piece in zip(dealt, np.split(group, cuts), strict=True):
            rows.append(piece)
    return [np.concatenate(rows) for rows in dealt]


def until_all_have(least: int, draw, attempts: int = 200) -> list[np.ndarray]:
    """Draws again until every client has `least` rows, as NIID-Bench does (Li et al. 2022, arXiv 2102.02079).

    Raises:
        InputError: no draw of `attempts` gave every client that many.
    """
    for _ in range(attempts):
        dealt = draw()
        smallest = min(map(len, dealt))
        if smallest >= least:
            return dealt
    raise InputError(
        f"{attempts} draws left some client with fewer than {least} rows (the last one: {smallest}); "
        "take fewer clients, a larger alpha, or a smaller min_rows"
    )
