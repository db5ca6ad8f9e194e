"""Trains each client's model once more after the last round, and evaluates the results; nothing is sent or stored."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from fedsim.counts import Counts
from fedsim.params import Params, moved, unflatten
from fedsim.training.client_store import Stored
from fedsim.training.evaluator import EvaluationRows, Evaluator
from fedsim.training.received import Received
from fedsim.training.task import Task
from fedsim.training.trainer import Trainer


class Tuner:
    """Counts what the clients of a chunk predict correctly with the models that they have tuned."""

    def __init__(self, trainer: Trainer, evaluator: Evaluator) -> None:
        self.trainer, self.evaluator = trainer, evaluator

    def tune(
        self,
        task: Task,
        round: int,
        params: np.ndarray,
        broadcast: np.ndarray,
        shared_rows: Sequence[int],
        rows: EvaluationRows,
        chunk: Stored,
    ) -> Counts:
        """Counts of a chunk of clients, each by the model with which it is evaluated, trained once more.

        That is the local training of one round more, except that a client's model starts as it was evaluated: with the
        shared tensors that it has stored, under rules that send each client others.

        Args:
            task: its method says how the models are tuned.
            round: rounds done.
            params: (P,) all parameters as they are evaluated.
            broadcast: what the server rule sends besides the parameters, flat.
            shared_rows, rows: as of `Evaluator.evaluate`.
        """
        models = self.trainer.models
        like, (_, broadcast_like, unicast_like) = models.module(task)[1], self.trainer.rule_tensors(task)
        evaluated = moved(unflatten(params, like), models.device)
        sent = moved(unflatten(broadcast, broadcast_like), models.device, task.dtype)
        own = {}
        if task.server.unicasts:
            stored = task.select(evaluated, "shared") | {name: evaluated[name] for name in unicast_like}
            own = {k: stored | models.private(task, k, written).params for k, written in chunk}
        tuned = self._tuned(task, Received(round + 1, evaluated, sent, own), chunk)
        counts = self.evaluator.count(task, round, evaluated, tuned, shared_rows, rows)
        # The clients of a stack are in the order of their numbers of rows.
        return replace(counts, scores=counts.scores[np.argsort(counts.scores[:, 0], kind="stable")])

    def _tuned(self, task: Task, received: Received, chunk: Stored) -> Iterator[tuple[int, Params]]:
        """Each client and the tensors that it has trained, which the next ones replace."""
        clients, data = self.trainer.clients, self.trainer.data
        rows_of = {client: clients.train_rows(client, received.round, data) for client, _ in chunk}
        for stack in self.trainer.train_stacks(task, received.round, received, chunk, rows_of):
            for k, client in enumerate(stack.clients):
                yield client, {name: tensor[k] for name, tensor in stack.params.items()}
