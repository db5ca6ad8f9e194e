"""One round over a pool of workers: clients train or are evaluated, chunk by chunk."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice, pairwise
from math import ceil
from operator import itemgetter
from typing import Any

import numpy as np

from fedsim.clients import Population, held_out_ids
from fedsim.cluster.workers import Workers
from fedsim.config import Config
from fedsim.counts import Counts, merge
from fedsim.errors import Diverged
from fedsim.methods.zero_shot import ZeroShot
from fedsim.params import Params, flatten
from fedsim.prepare import judged
from fedsim.representations import Encoded
from fedsim.schedule import Turn, schedule
from fedsim.servers.fedavg import FedAvg
from fedsim.state import ServerState, advance, kept_past
from fedsim.training.task import Task
from fedsim.updates import CLIENT_STATS, RoundSum, sum_chunks

CHUNKS, LARGEST_CHUNK = 16, 64  # of a cohort; and clients: enough to outweigh a call, few enough to do again


class Federation:
    """The workers, and the clients that they train and evaluate."""

    def __init__(
        self,
        config: Config,
        task: Task,
        features: Encoded,
        clients: Population,
        workers: Workers,
        params: Params,
        splits: Sequence[str],
    ) -> None:
        self.config, self.task, self.clients, self.workers, self.splits = config, task, clients, workers, splits
        self.away = list(range(clients.trainers, len(clients))) if "test" in splits else []
        self.domains = held_out_ids(features, config.held_out)
        self.sent = list(task.of(params, "shared", "server"))
        self.down, self.up = task.payload(params, config.cohort or clients.trainers)
        self.personal = bool(task.of(params, "private"))
        self.rows = np.full(clients.trainers, -1, np.int64)  # train rows, once somebody has asked for them

    def turns(self, done: int) -> Iterator[Turn]:
        """The rounds that are left."""
        turns = schedule(self.config, self.clients.trainers, self._train_rows, self.down, self.up)
        return islice(turns, done, self.config.rounds)

    def train(self, state: ServerState, turn: Turn) -> tuple[ServerState, np.ndarray]:
        """The next state, from the sum over those whose work counts, chunk by chunk in order; and their notes."""
        chunks = []
        for version, group in groupby(turn.trained, key=itemgetter(1)):
            written = [(client, self._written(state, client)) for client, _ in group]
            chunks += [(version, chunk) for chunk in self._chunks(written)]
        if not chunks:
            return replace(state, round=turn.round, past=kept_past(state, self.sent, turn.needed)), np.empty(
                0, CLIENT_STATS
            )
        past = state.past | {state.round: {}}
        sent = {version: flatten(state.params | (past[version] if self.sent else {})) for version, _ in chunks}
        broadcast = self.task.server.broadcast(state.slots, self.task.of(state.params, "shared"))
        what = self.task, turn.round, sent, flatten(broadcast)
        total = sum_chunks(self.workers.map("train", chunks, *what), self.clients.trainers)
        _check_finite(total, turn.round)
        if len(state.private):
            private = state.private.copy()
            private[total.clients["client"]] = turn.round
            state = replace(state, private=private)
        state = advance(self.config.server, state, total, self.sent, turn.needed, self.task.seed)
        if names := [name for name in self.sent if not state.params[name].isfinite().all()]:
            remedy = "a smaller --method.lr" + " or --server.lr" * hasattr(self.config.server, "lr")
            raise Diverged.in_round(turn.round, f"{names[0]} after the server's step", remedy)
        return state, total.clients

    def evaluate(self, state: ServerState) -> Counts:
        """Counts of all clients: by the shared model, or each by its own where it has private tensors."""
        ids = [*judged(self.config, self.clients), *([] if self.personal else self.away)]
        chunks = self._chunks([(client, self._written(state, client) * self.personal) for client in ids])
        also = self.away if self.personal else []
        return self._judged(chunks, self.task, state.round, state.params, also)

    def zero_shot(self) -> Counts:
        plain = Task(ZeroShot(), FedAvg(), self.task.seed, self.task.dtype)
        chunks = self._chunks([(client, 0) for client in [*judged(self.config, self.clients), *self.away]])
        return self._judged(chunks, plain, 0, {}, [])

    def _judged(self, chunks: list, task: Task, round: int, params: Params, also: list[int]) -> Counts:
        what = task, round, flatten(params), also, self.domains, self.splits
        return merge(self.workers.map("evaluate", chunks, *what))

    def _train_rows(self, clients: Sequence[int]) -> np.ndarray:
        for client in clients:
            if self.rows[client] < 0:
                self.rows[client] = len(self.clients[client].train)
        return self.rows[list(clients)]

    def _written(self, state: ServerState, client: int) -> int:
        return int(state.private[client]) if client < len(state.private) else 0

    def _chunks(self, clients: list[Any]) -> list[list[Any]]:
        # Never by the number of actors: sums are rounded chunk by chunk.
        if size := self.config.chunk:
            return [clients[first : first + size] for first in range(0, len(clients), size)]
        count = max(min(CHUNKS, len(clients)), ceil(len(clients) / LARGEST_CHUNK))
        ends = [len(clients) * k // count for k in range(count + 1)]
        return [clients[first:last] for first, last in pairwise(ends)]  # as even as can be, for nobody to wait long


def _check_finite(total: RoundSum, round: int) -> None:
    """Raises Diverged where a sum of updates, or the loss of a client that took a step, is NaN or infinite."""
    if not np.isfinite(total.delta).all():
        raise Diverged.in_round(round, "an update")
    losses = total.clients["loss"][total.clients["steps"] > 0]
    if not np.isfinite(losses).all():
        raise Diverged.in_round(round, "the loss of a client")
