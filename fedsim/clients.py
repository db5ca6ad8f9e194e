"""Clients: which rows each holds, and which clients train in a round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedsim.class_tasks import ClassTasks, split_classes
from fedsim.datasets import TEST, Labels, vocabularies
from fedsim.errors import InputError, listing
from fedsim.partitions import Partition, Splits
from fedsim.registry import name_of
from fedsim.rng import numpy_rng
from fedsim.shares import part


@dataclass(frozen=True)
class Client:
    """Rows into the features, ascending. Held-out domains and new classes are clients with nothing to train on."""

    id: int
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    split: str = "test"  # of the evaluated rows; "new" for rows of classes that no client trains on

    def within(self, classes: Sequence[int], labels: Labels) -> "Client":
        """The same with its rows of these classes only."""
        kept = np.zeros(len(labels.classes), bool)
        kept[list(classes)] = True
        parts = {name: getattr(self, name) for name in ("train", "val", "test")}
        return replace(self, **{name: rows[kept[labels.y[rows]]] for name, rows in parts.items()})


@dataclass(frozen=True)
class Population(Sequence):
    """The training clients, then one client for each held-out domain, then one for the new classes if there are any.

    Attributes:
        splits: of each training client; perhaps drawn at each access, so access them once.
        held_out: (n,) test rows of each held-out domain.
        new: (n,) test rows of the new classes, which no client trains on; None if there are no new classes.
        new_classes: (m,) indices of the new classes.
        common: (n,) train rows that every training client has, besides its own; None: there are none.
        images: (N,) the row whose image each row of the data set shows; None: its own (`Partition.images`).
        class_tasks: which classes are trained in which rounds; None: all in every round.
    """

    splits: Sequence[Splits]
    held_out: Sequence[np.ndarray]
    new: np.ndarray | None = None
    new_classes: Sequence[int] = ()
    common: np.ndarray | None = None
    images: np.ndarray | None = None
    class_tasks: ClassTasks | None = None

    @property
    def trainers(self) -> int:
        """Number of training clients; their ids are below it."""
        return len(self.splits)

    def __len__(self) -> int:
        return len(self.splits) + len(self.held_out) + (self.new is not None)

    def __getitem__(self, client: int) -> Client:
        if not 0 <= client < len(self):
            raise IndexError(f"no client {client} among {len(self)}")
        if client < self.trainers:
            return Client(client, *self.splits[client])
        nothing, split = np.empty(0, np.int64), self.split_of(client)
        others = [*self.held_out] if self.new is None else [*self.held_out, self.new]
        return Client(client, nothing, nothing, others[client - self.trainers], split)

    def rows(self) -> np.ndarray | None:
        """(n,) the rows whose images any of them has, ascending; None if clients are drawn when they are accessed."""
        if not isinstance(self.splits, list):
            return None
        new = [] if self.new is None else [self.new]
        rows = np.concatenate([*self.held_out, *new, *(part for split in self.splits for part in split)])
        return np.unique(rows if self.images is None else self.images[rows])

    def split_of(self, client: int) -> str:
        """`Client.split` of a client, without drawing its rows."""
        return "new" if client == len(self.splits) + len(self.held_out) else "test"

    def classes_of(self, client: Client, rows: Labels) -> np.ndarray:
        """(C,) bool, a client's label space: the classes of its rows.

        For a held-out domain these are the trained classes, for the client of the new classes the new ones.
        """
        if client.id >= self.trainers:
            trained = self.trained_classes(rows)
            return ~trained if client.split == "new" else trained
        present = np.zeros(len(rows.classes), bool)
        present[rows.y[np.concatenate([client.train, client.val, client.test])]] = True
        return present

    def trained_classes(self, rows: Labels, round: int | None = None) -> np.ndarray:
        """(C,) bool, all classes but the new ones, and but those whose task has not begun by a round."""
        trained = np.ones(len(rows.classes), bool)
        trained[list(self.new_classes)] = False
        if self.class_tasks and round is not None:
            trained &= np.isin(np.arange(len(trained)), self.class_tasks.seen(round))
        return trained

    def in_tasks(self, rows: Labels, tasks: int, rounds: int, seed: int) -> "Population":
        """The same clients, whose classes arrive in so many tasks over the rounds.

        Raises:
            InputError: there are too few classes or rounds, or clients whose rows cannot be limited to some classes.
        """
        if tasks == 1:
            return replace(self, class_tasks=None)
        if not isinstance(self.splits, list):
            raise InputError(
                "tasks needs a partition that assigns the rows of all clients at once; this one draws them client by "
                "client"
            )
        if rows.class_domain:
            raise InputError("tasks splits the classes of one data set, and each of a suite has classes of its own")
        trained = np.flatnonzero(self.trained_classes(rows)).tolist()
        return replace(self, class_tasks=split_classes(trained, tasks, rounds, seed))

    def train_rows(self, client: int, round: int, rows: Labels) -> np.ndarray:
        """(n,) the rows on which a client trains in a round."""
        if not self.class_tasks:
            return self[client].train
        return self[client].within(self.class_tasks.current(round), rows).train


def make_clients(
    rows: Labels,
    partition: Partition,
    clients: int | None,
    held_out: tuple[str, ...],
    seed: int,
    train_share: float = 0.6,
    shots: int | None = None,
    new_classes: float = 0.0,
    common: float = 0.0,
) -> Population:
    """Assigns the rows of all domains except the held-out ones to clients, and each client's rows to its splits.

    Args:
        held_out: names of the held-out domains; each becomes one more client, after the others. Their rows of new
            classes are not used: accuracy would mix the new domain with the new classes.
        seed: the partition's seed.
        train_share: fraction of a client's rows used for training; validation and test get half of the rest each.
        shots: train rows per client and class; None: all.
        new_classes: fraction of the classes that no client trains on, see `new_of`. Their rows in the training domains
            (only TEST rows if the data set has these) become one more client, after the held-out domains.
        common: share of all train rows, few-shot ones if `shots`, that every client also has.

    Raises:
        InputError: a domain does not exist, none is left to train on, or a client has no train rows; there are no new
            classes in such a share, or no rows of theirs, or no common rows; a data set that makes rows on demand has
            no rows to choose from.
    """
    if rows.rows_per_client and (shots or new_classes or common):
        name = "shots" if shots else "new_classes" if new_classes else "common"
        raise InputError(f"{name} needs a finite data set; this one generates rows on demand")
    if common and rows.class_domain:
        raise InputError("common gives all clients the same rows, but those of a suite have different classes")
    held_out_domains = held_out_indices(rows, held_out)
    domains = [domain for domain in range(len(rows.domains)) if domain not in held_out_domains]
    new, new_test = new_of(rows.classes, new_classes, rows.class_domain), None
    if new:
        unseen = np.isin(rows.y, new)
        own_test = (rows.split == TEST).any()
        new_test = np.flatnonzero(unseen & np.isin(rows.domain, domains) & ((rows.split == TEST) | (not own_test)))
        if not len(new_test):
            raise InputError(
                f"no test rows of the new classes {listing([rows.class_labels[c] for c in new])} to evaluate on"
            )
        rows = replace(rows, domain=np.where(unseen, -1, rows.domain))  # of no domain, so no client gets them
    splits = partition.assign(rows, domains, clients, seed, train_share)
    # Partitions that draw clients on demand check this for all clients at once.
    if isinstance(splits, list) and (idle := [k for k, (train, _, _) in enumerate(splits) if not len(train)]):
        who = f"client {idle[0]} has" if len(idle) == 1 else f"clients {listing(idle)} have"
        raise InputError(f"{who} no train rows; use fewer clients or another partition")
    images = partition.images(rows, splits, seed)
    if shots:
        few = _FewShot(splits, rows.y, shots, seed)
        splits = list(few) if isinstance(splits, list) else few
    given = None
    if common:
        if not isinstance(splits, list):
            raise InputError(
                "common needs a partition that assigns the rows of all clients at once; "
                f"{name_of(partition)} draws them client by client"
            )
        splits, given = _with_common(splits, common, seed)
    held_out_rows = [partition.held_out(rows, domain) for domain in held_out_domains]
    return Population(splits, held_out_rows, new_test, new, given, images)


def _with_common(splits: list[Splits], share: float, seed: int) -> tuple[list[Splits], np.ndarray]:
    """Gives all clients the same random share of all train rows; returns these rows, too.

    No validation or test row of a client is among them.

    Source: data sharing as in FedRDS, Lv et al. 2023, doi 10.3390/app132312962.
    """
    trained, *others = (np.concatenate(parts) for parts in zip(*splits, strict=True))
    rows = np.setdiff1d(trained, np.concatenate(others))
    if not (count := part(len(rows), share)):
        raise InputError(
            f"common {share:g} of {len(rows)} train rows rounds down to none; give {1 / max(1, len(rows)):.3g} or more"
        )
    common = np.sort(numpy_rng(seed, "common").choice(rows, count, replace=False))
    return [(np.sort(np.append(own, np.setdiff1d(common, own))), val, test) for own, val, test in splits], common


@dataclass(frozen=True)
class _FewShot(Sequence):
    """Splits with at most `shots` train rows of each class, drawn with a random number generator of each client."""

    splits: Sequence[Splits]
    y: np.ndarray
    shots: int
    seed: int

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, client: int) -> Splits:
        train, val, test = self.splits[client]
        drawn = numpy_rng(self.seed, "shots", client).permutation(train)
        by_class = drawn[np.argsort(self.y[drawn], kind="stable")]
        _, starts, counts = np.unique(self.y[by_class], return_index=True, return_counts=True)
        rank = np.arange(len(by_class)) - np.repeat(starts, counts)  # among the rows of its class
        return np.sort(by_class[rank < self.shots]), val, test


def new_of(classes: Sequence[str], share: float, class_domain: Sequence[int] = ()) -> list[int]:
    """Indices of the new classes, which no client trains on: the last by label; their number is rounded down.

    In a suite, these are the last of each data set.

    Source: the base-to-new protocol of CoCoOp, Zhou et al. 2022, arXiv 2203.05557, where the second half is new.

    Args:
        class_domain: see `Labels`.

    Raises:
        InputError: the number is rounded down to 0.
    """
    new = []
    for group in vocabularies(len(classes), class_domain):
        count = part(len(group), share)
        if share and not count:
            raise InputError(
                f"new_classes {share:g} of {len(group)} classes rounds down to none; give {1 / len(group):.3g} or more"
            )
        new += group[len(group) - count :]
    return new


def held_out_indices(rows: Labels, held_out: tuple[str, ...]) -> list[int]:
    """Indices of the held-out domains.

    Raises:
        InputError: no such domain, or no domain left.
    """
    for name in held_out:
        if name not in rows.domains:
            names = [repr(domain) if "," in domain else domain for domain in rows.domains]
            hint = "" if names == list(rows.domains) else "; a name with a comma needs a list in YAML: held_out: [...]"
            raise InputError(f"no domain {name!r} to hold out; available: {listing(names)}{hint}")
    if len(set(held_out)) == len(rows.domains):
        raise InputError(f"all domains are held out; at least one of {listing(rows.domains)} must train")
    return [rows.domains.index(name) for name in dict.fromkeys(held_out)]


def neighbors_of(client: int, population: int, count: int, seed: int) -> list[int]:
    """Ids of the other clients on whose test rows a client's model is evaluated, ascending; the same in every round."""
    drawn = numpy_rng(seed, "neighbors", client).choice(population - 1, count, replace=False)
    return sorted((drawn + (drawn >= client)).tolist())


def sample_cohort(population: int, cohort: int | None, seed: int, round: int) -> list[int]:
    """Ids of the clients that train in a round, without replacement.

    Ascending, so float sums over the cohort do not depend on which client finished first.
    """
    if cohort is None or cohort == population:
        return list(range(population))
    return sorted(numpy_rng(seed, "cohort", round).choice(population, cohort, replace=False).tolist())
