"""Partitions: how the rows of the training domains go to clients.

Every partition draws from a seed of its own (`--partition-seed`), apart from training's, so that the spread
over partitions and the spread over training runs can be told apart.
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


class Dealing(ABC):
    """A way in which clients come by their rows. Subclasses are components; of most, the base is `Partition`."""

    @abstractmethod
    def deal(
        self, rows: Labels, domains: list[int], clients: int | None, seed: int, train_share: float
    ) -> Sequence[Splits]:
        """The rows of each training client. A client may be drawn only when it is asked for.

        Args:
            domains: those that clients train on.
            clients: how many clients, or None for the natural number.
            train_share: of a client's rows; validation and test get half of the rest each.

        Raises:
            InputError: that number of clients does not fit, or the data set does not.
        """

    def away(self, rows: Labels, domain: int) -> np.ndarray:
        """The test rows of a domain that nobody trains on."""
        return np.flatnonzero((rows.domain == domain) & ((rows.split == TEST) | (not rows.unseen_test)))


class Partition(Dealing):
    """Deals the rows that there are, each to one client at most."""

    def deal(self, rows, domains, clients, seed, train_share):
        refuse_made(rows, self)
        kept = np.flatnonzero(np.isin(rows.domain, domains))
        dealt = self.split(rows.y[kept], rows.domain[kept], clients, numpy_rng(seed, "partition"))
        return [
            cut(rows, np.sort(kept[part]), train_share, numpy_rng(seed, "split", k)) for k, part in enumerate(dealt)
        ]

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


def cut(rows: Labels, mine: np.ndarray, train_share: float, rng: np.random.Generator) -> Splits:
    """Some rows as train, validation and test rows.

    A set's own split is kept where it says one. The rest is shuffled and cut 60/20/20, if `train_share` is 0.6, as in
    FedCLIP's code, which floors each share and drops what remains.
    """
    said = rows.split[mine]
    own_val, own_test = bool((rows.split == VAL).any()), bool((rows.split == TEST).any())
    free = rng.permutation(mine[drawn(rows)[mine]])
    other_share = (1 - train_share) / 2
    if own_test:
        # In floats, as ever: they decide which way a half is rounded, and no row is lost either way.
        train = round(len(free) * train_share / (train_share + other_share))
        val, test = len(free) - train, 0
    else:
        train = part(len(free), train_share)
        val = test = int(len(free) * (1 - decimal(train_share)) / 2)
    shuffled = np.split(free, [train, train + val, train + val + test])
    fixed = mine[(said == TRAIN) & own_val], mine[said == VAL], mine[said == TEST]
    first, second, third = (np.sort(np.concatenate(pair)) for pair in zip(fixed, shuffled, strict=False))
    return first, second, third


def drawn(rows: Labels) -> np.ndarray:
    """(n,) bool, the rows whose split is drawn; of sets that make rows on demand (1,), for all of them."""
    # A set that says train and test but no validation leaves us its train rows to choose that from.
    return (rows.split == UNASSIGNED) | ((rows.split == TRAIN) & ~(rows.split == VAL).any())


def sizes(rows: int, train_share: float) -> tuple[int, int, int]:
    """Train, validation and test rows of a client that draws its rows alone."""
    train = part(rows, train_share)
    other = (rows - train) // 2
    return train, other, other


def refuse_made(rows: Labels, partition: Dealing) -> None:
    """Raises InputError where rows are made on demand, and cannot be dealt."""
    if rows.rows_per_client:
        raise InputError(
            f"partition {name_of(partition)} deals rows that there are; these are made client by client: "
            "take --partition natural"
        )


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
