"""Evaluates chunks of clients."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.clients import Client, Population, neighbors_of
from fedsim.counts import Counts, tally
from fedsim.errors import Diverged, InputError
from fedsim.params import Params, moved, unflatten
from fedsim.registry import name_of
from fedsim.training.client_store import Stored
from fedsim.training.models import Models
from fedsim.training.predict import Entry, Predictions, Spaces, predict
from fedsim.training.task import Task


class EvaluationRows(NamedTuple):
    """On which rows clients are evaluated.

    Attributes:
        splits: those of `counts.SPLITS` that are evaluated; rows of the others are not read.
        held_out: indices of the held-out domains.
        neighbors: number of other clients on whose test rows the model of each client that trains is evaluated.
        seed: that by which they are drawn.
        classes: indices of those whose rows are evaluated and that compete; None: all.
    """

    splits: Sequence[str]
    held_out: Sequence[int] = ()
    neighbors: int = 0
    seed: int = 0
    classes: Sequence[int] | None = None


class Evaluator:
    """Counts what the clients of a chunk predict correctly."""

    def __init__(self, models: Models, clients: Population) -> None:
        self.models, self.clients = models, clients
        self.data, self.device = models.data, models.device
        self.trained_classes = clients.trained_classes(self.data)

    def evaluate(
        self,
        task: Task,
        round: int,
        params: np.ndarray,
        shared_rows: Sequence[int],
        evaluated: EvaluationRows,
        chunk: Stored,
    ) -> Counts:
        """Counts of a chunk of clients on their own validation and test rows, and on those of others.

        Args:
            params: (P,) all parameters as the server has them.
            shared_rows: ids of clients that do not train; every client of the chunk is evaluated on their rows too.

        Raises:
            Diverged: a prediction is NaN, after some rounds of training.
            InputError: the same in round 0.
        """
        like = self.models.module(task)[1]
        received, personal = moved(unflatten(params, like), self.device), task.is_personal(like)
        own = ((k, self.models.private(task, k, written).params if personal else None) for k, written in chunk)
        return self.count(task, round, received, own, shared_rows, evaluated)

    def count(
        self,
        task: Task,
        round: int,
        received: Params,
        own: Iterable[tuple[int, Params | None]],
        shared_rows: Sequence[int],
        evaluated: EvaluationRows,
    ) -> Counts:
        """The same of clients with the tensors that each has in place of some that it received; None: of one model.

        Args:
            received: all parameters.
            own: by client; its tensors are read before the next client's are asked for.
        """
        module, _ = self.models.module(task)
        module.load_state_dict(received)
        entries, predictions = [], []
        reads, joint = task.method.reads.image, task.method.joint_classes
        model = partial(task.method.logits, module)
        each_of = partial(predict, model, level=reads, joint=joint, device=self.device)

        def predictions_of(entries: list[Entry]) -> list[Predictions]:
            attacked = [split == "attacked" for (_, split, _), *_ in entries]
            kinds = {
                kind: iter(each_of(partial(self._read, task, kind), entries=list(compress(entries, chosen))))
                for kind, chosen in ((False, [not each for each in attacked]), (True, attacked))
            }
            return [next(kinds[kind]) for kind in attacked]

        others = [self._client(k, evaluated) for k in shared_rows]
        for k, tensors in own:
            client = self._client(k, evaluated)
            parts = [("val", client.val, client), (client.split, client.test, client)]
            parts += [(other.split, other.test, other) for other in others]
            parts += [("neighbor", rows, client) for rows in self._neighbors(k, evaluated)]
            parts += [("attacked", rows, owner) for owner, rows in self._attacked(task, [client, *others], evaluated)]
            for split, rows, owner in parts:
                if split in evaluated.splits:
                    pieces = self._by_vocabulary(rows)
                    entries += [self._entry(task, round, k, split, part, owner, evaluated.classes) for part in pieces]
            if tensors is not None:
                module.eval().load_state_dict(received | tensors)
                predictions += predictions_of(entries[len(predictions) :])
        module.eval()
        predictions += predictions_of(entries[len(predictions) :])  # of one model for all: all rows at once
        predicted, predicted_own, confidence = (
            np.concatenate([np.empty(0, np.int64), *parts]) for parts in zip(*predictions, strict=True)
        )
        if not np.isfinite(confidence).all():
            if not round:
                raise InputError(f"method {name_of(task.method)} predicts NaN before it is trained")
            raise Diverged.in_round(round, "a prediction of the trained model")
        counted = [entry for entry, *_ in entries]
        expected = [self._aims(task, rows) if split == "attacked" else self.data.y[rows] for _, split, rows in counted]
        rest = confidence, self.data, evaluated.held_out, expected
        return tally(counted, predicted, predicted_own, *rest)

    def _attacked(
        self, task: Task, owners: Sequence[Client], evaluated: EvaluationRows
    ) -> Iterator[tuple[Client, np.ndarray]]:
        """The test rows at which an attack aims, by their owner."""
        if not task.attack.targeted or "attacked" not in evaluated.splits:
            return
        for owner in owners:
            if owner.split == "test":
                yield owner, owner.test[self._aims(task, owner.test) >= 0]

    def _aims(self, task: Task, rows: np.ndarray) -> np.ndarray:
        return task.attack.aims(self.data.y[rows], self.data.classes, self.trained_classes)

    def _client(self, k: int, evaluated: EvaluationRows) -> Client:
        """A client with the rows on which it is evaluated, and the train rows that its model may know of."""
        client = self.clients[k]
        return client if evaluated.classes is None else client.within(evaluated.classes, self.data)

    def _neighbors(self, client: int, evaluated: EvaluationRows) -> list[np.ndarray]:
        """The test rows of a client's neighbors, all together; none of a client that does not train."""
        count, trainers = evaluated.neighbors, self.clients.trainers
        if not count or client >= trainers or "neighbor" not in evaluated.splits:
            return []
        ids = neighbors_of(client, trainers, count, evaluated.seed)
        return [np.concatenate([self._client(other, evaluated).test for other in ids])]

    def _entry(
        self,
        task: Task,
        round: int,
        k: int,
        split: str,
        rows: np.ndarray,
        owner: Client,
        classes: Sequence[int] | None,
    ) -> Entry:
        """Some rows of `owner`, to be predicted with the parameters of client k."""
        context = self.models.contexts.of(task, round, [owner])
        context = context and context.part(0)._replace(id=torch.tensor(k))
        protocol, own = self._spaces(owner, rows, classes)
        spaces = protocol, protocol if split == "neighbor" else own  # of other clients' rows, no classes are its own
        return (k, split, rows), spaces, context

    def _by_vocabulary(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows in parts for which the same classes compete: in a suite, those of each data set."""
        if not self.data.class_domain or not len(rows):
            return [rows]
        domain = self.data.domain[rows]
        return [rows[domain == each] for each in np.unique(domain)]

    def _spaces(self, client: Client, rows: np.ndarray, classes: Sequence[int] | None) -> Spaces:
        own = self.clients.classes_of(client, self.data)
        protocol = own if client.split == "new" else self.trained_classes
        competing = self.data.competing(rows)
        if classes is not None:
            competing &= np.isin(np.arange(len(competing)), classes)
        return torch.from_numpy(protocol & competing), torch.from_numpy(own & competing)

    def _read(self, task: Task, attacked: bool, rows: np.ndarray) -> Tensor:
        return self.models.inputs(task, rows, attacked=np.ones(len(rows), bool) if attacked else None).whole()
