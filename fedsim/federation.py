"""One round over a pool of workers: clients are surveyed, trained or evaluated, chunk by chunk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, pairwise
from math import ceil
from operator import itemgetter
from typing import Any

import numpy as np

from fedsim.attacks.honest import Honest
from fedsim.class_tasks import task_in
from fedsim.clients import held_out_indices
from fedsim.cluster.workers import Workers
from fedsim.counts import Counts, merge
from fedsim.errors import Diverged
from fedsim.methods.zero_shot import ZeroShot
from fedsim.params import Params, flatten
from fedsim.prepare import Experiment, evaluated_clients
from fedsim.rng import numpy_rng
from fedsim.schedule import PlannedRound, schedule
from fedsim.servers import Bank, Server
from fedsim.servers.fedavg import FedAvg
from fedsim.state import ServerState, advance, past_versions
from fedsim.training.evaluator import EvaluationRows
from fedsim.training.malice import colluded
from fedsim.training.root import root_rows
from fedsim.training.survey import Survey
from fedsim.training.task import Task, backbone_of, local_rows
from fedsim.training.trainer import Chunk
from fedsim.updates import CLIENT_STATS, RoundSum, sum_chunks

# Chunks of a cohort, at least; and clients of a chunk, at most: enough to outweigh a call, few enough to repeat.
CHUNKS, LARGEST_CHUNK = 16, 64


@dataclass(frozen=True)
class _WithUnicast(Sequence[Chunk]):
    """The same chunks with what the rule sends to each client.

    It is computed when a chunk is handed out, so memory grows with chunks in flight and not with the cohort.
    """

    chunks: Sequence[Chunk]
    server: Server
    bank: Bank
    params: Params

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Chunk:
        chunk = self.chunks[index]
        # Client by client, so that the size of a chunk does not change a bit.
        rows = [flatten(self.server.unicast(client, self.bank, self.params)) for client, _ in chunk.clients]
        return chunk._replace(unicast=np.stack(rows))


class Federation:
    """The clients of an experiment, and the workers that train and evaluate them.

    Attributes:
        evaluated: ids of the training clients that are evaluated.
        test_only: ids of the clients that only have test rows, of held-out domains or new classes.
        rows_evaluated: on which rows clients are evaluated.
        cohort: clients in a round.
        received_names: names of the tensors that a client receives.
        bytes_down, bytes_up: (K,) int64, what each client receives and sends in a round.
        survey: what is summed over all training clients before round 1; None if the method needs nothing.
        root_rows: (n,) the train rows of which the server has copies.
        is_personal: each client is evaluated with tensors of its own.
        classes: (K,) int64, the class of each client's device, an index into `Fleet.devices`.
        rows: (T, K) int64, rows on which each client trains in the rounds of each class task; -1 where unknown, since
            they may be generated on demand.
    """

    def __init__(self, experiment: Experiment, task: Task, workers: Workers, params: Params) -> None:
        config, clients = experiment.config, experiment.clients
        self.experiment, self.task, self.clients, self.workers = experiment, task, clients, workers
        self.evaluated = evaluated_clients(config, clients)
        self.test_only = list(range(clients.trainers, len(clients))) if "test" in experiment.splits else []
        held_out = held_out_indices(experiment.data.source, config.held_out)
        self.rows_evaluated = EvaluationRows(experiment.splits, held_out, config.neighbors, config.partition_seed)
        self.received_names = list(task.select(params, "shared", "server"))
        self.cohort = config.cohort or clients.trainers
        self.bytes_down, self.bytes_up = task.payloads(params, self.cohort, clients.trainers)
        self.classes = config.fleet.by_class(range(len(config.fleet.devices)), clients.trainers, task.seed)
        self.survey = None
        if task.select(params, "surveyed"):
            self.survey = Survey(task, params, backbone_of(experiment.encoded.source, dtype=task.dtype))
        self.is_personal = task.is_personal(params)
        self.root_rows = root_rows(config.server, clients, config.seed)
        self.rows = np.full((config.tasks, clients.trainers), -1, np.int64)

    def schedule(self, done: int) -> Iterator[PlannedRound]:
        """The rounds that remain after `done` rounds."""
        config = self.experiment.config
        once = self.survey.payload if self.survey else (0, 0)
        rounds = schedule(config, self.clients.trainers, self.local_rows, self.bytes_down, self.bytes_up, once)
        return islice(rounds, done, config.rounds)

    def _surveyed(self, state: ServerState) -> ServerState:
        """The state of round 0 with what follows from the survey of all clients that train."""
        if not self.survey:
            return state
        chunks = self._chunks(list(range(self.clients.trainers)))
        sums = self.workers.map("survey", chunks, self.task, flatten(state.params), self.survey.shapes)
        return replace(state, params=state.params | self.survey.conclude(sums))

    def bytes_of(self, planned: PlannedRound, clients: np.ndarray) -> tuple[int, int]:
        """Bytes that all clients receive and send in a round, in which the updates of these clients, (n,), count."""
        once = self.survey.payload if self.survey and planned.round == 1 else (0, 0)
        population = self.clients.trainers
        up = int(self.bytes_up[clients].sum())
        return planned.bytes_down + population * once[0], up + population * once[1]

    def train(self, state: ServerState, planned: PlannedRound) -> tuple[ServerState, np.ndarray]:
        """One round of training; before the first, the survey if there is one.

        Returns:
            The next state, and (n,) of `CLIENT_STATS`, of the clients whose updates count.

        Raises:
            Diverged: an update, a loss or a parameter is not finite.
        """
        if planned.round == 1:
            state = self._surveyed(state)
        bound = self.task.privacy.bound(state.privacy)
        chunks: Sequence[Chunk] = []
        for version, group in groupby(planned.trained, key=itemgetter(1)):
            stored = [(client, _last_write(state, client)) for client, _ in group]
            chunks += [Chunk(version, clients, bound=bound) for clients in self._chunks(stored)]
        enough = self.task.codec.enough(len(planned.trained), planned.asked)
        if not enough or (not chunks and not self.task.privacy.poisson):
            past = past_versions(state, self.received_names, planned.needed)
            return replace(state, round=planned.round, past=past), np.empty(0, CLIENT_STATS)
        past = state.past | {state.round: {}}
        versions = {
            version: flatten(state.params | (past[version] if self.received_names else {}))
            for version in {chunk.version for chunk in chunks}
        }
        shared = self.task.select(state.params, "shared")
        broadcast = flatten(self.task.server.broadcast(state.slots, shared))
        if self.task.server.unicasts:
            received = self.task.select(state.params, "shared", "server")
            bank = {client: state.bank[client] for client in np.flatnonzero(state.private).tolist()}
            chunks = _WithUnicast(chunks, self.task.server, bank, received)
        sums = self.workers.map("train", chunks, self.task, planned.round, versions, broadcast)
        rounds = self.task.rounds if self.task.server.fixed_rounds else None
        total = sum_chunks(sums, self.clients.trainers) if chunks else _nothing(shared, self.clients.trainers)
        total, clients = replace(total, round=planned.round, rounds=rounds), total.clients
        total = colluded(self.task, total)
        if len(self.root_rows):
            (root,) = self.workers.map(
                "root", [self.root_rows], self.task, planned.round, versions[state.round], broadcast
            )
            total = replace(total, root=root)
        _check_sum(total, planned.round)
        if len(state.private):
            private = state.private.copy()
            private[total.clients["client"]] = planned.round
            state = replace(state, private=private)
        if self.task.server.unicasts:
            sent = self.task.select(self.task.received(state.params), "shared")
            state = replace(state, bank=_updated(state.bank, flatten(sent), total))
        rng = numpy_rng(self.task.seed, "privacy", planned.round)
        total, memory = self.task.privacy.release(total, state.privacy, self.cohort, rng)
        state, still = replace(state, privacy=memory), self._still(state.params, planned)
        state = advance(self.task.server, state, total, self.received_names, planned.needed, self.task.seed)
        state = replace(state, params=state.params | still)
        self._check_params(state)
        return state, clients

    def _still(self, params: Params, planned: PlannedRound) -> Params:
        """The shared tensors that no client of a round trains, whatever the memory of a rule or noise would add."""
        names, rounds = self.task.select(params, "shared", "private"), {version + 1 for _, version in planned.trained}
        learned = {name for round in rounds or {planned.round} for name in self.task.method.learned(names, round)}
        return {name: tensor for name, tensor in self.task.select(params, "shared").items() if name not in learned}

    def evaluate(self, state: ServerState) -> Counts:
        """Counts of all evaluated clients: by the shared model, or of each by its own if it has one."""
        params, rows = self.reported(state).params, self.rows_evaluated
        if tasks := self.clients.class_tasks:
            rows = rows._replace(classes=[*tasks.seen(state.round), *self.clients.new_classes])
        clients = [(client, _last_write(state, client) * self.is_personal) for client in self.evaluated]
        if self.is_personal:
            return self._counts(self.task, state.round, params, clients, rows, shared_rows=self.test_only)
        clients += [(client, 0) for client in self.test_only]
        return self._counts(self.task, state.round, params, clients, rows)

    def reported(self, state: ServerState) -> ServerState:
        """The state with the parameters that are evaluated, where the rule sends clients other ones."""
        return replace(state, params=self.task.evaluated(state.params, state.slots))

    def zero_shot(self) -> Counts:
        """The same by zero-shot CLIP."""
        # A trigger of pixels is not in the features that zero-shot CLIP reads.
        same = self.task.method.reads.image != "pixels" or not self.task.attack.triggers
        attack = self.task.attack if same else Honest()
        task = Task(ZeroShot(), FedAvg(), self.task.seed, self.task.dtype, attack=attack)
        clients = [(client, 0) for client in [*self.evaluated, *self.test_only]]
        return self._counts(task, 0, {}, clients, self.rows_evaluated)

    def tune(self, state: ServerState) -> Counts:
        """Counts of all evaluated clients, each by its model after `tune_epochs` more local epochs; stores nothing.

        The step size is the method's `lr`: in the last rounds, a schedule may have lowered it to nothing.
        """
        config = self.experiment.config
        method = replace(config.method, local_epochs=config.tune_epochs, schedule="constant", warmup_rounds=0)
        task = replace(self.task, method=config.server.adapt(method), fleet=replace(config.fleet, epochs=()))
        broadcast = flatten(task.server.broadcast(state.slots, task.select(state.params, "shared")))
        chunks = self._chunks([(client, _last_write(state, client)) for client in self.evaluated])
        arguments = task, state.round, flatten(self.reported(state).params), broadcast
        return merge(self.workers.map("tune", chunks, *arguments, self.test_only, self.rows_evaluated))

    def _counts(
        self,
        task: Task,
        round: int,
        params: Params,
        clients: list[tuple[int, int]],
        rows: EvaluationRows,
        shared_rows: Sequence[int] = (),
    ) -> Counts:
        arguments = task, round, flatten(params), shared_rows, rows
        return merge(self.workers.map("evaluate", self._chunks(clients), *arguments))

    def local_rows(self, clients: Sequence[int], round: int) -> np.ndarray:
        """(n,) int64, the rows on which these clients train in a local epoch of a round."""
        labels, config = self.experiment.data.source, self.experiment.config
        rows = self.rows[task_in(round, config.tasks, config.rounds)]
        for client in clients:
            if rows[client] < 0:
                rows[client] = local_rows(self.task.method, labels, self.clients.train_rows(client, round, labels))
        return rows[list(clients)]

    def _chunks(self, clients: list[Any]) -> list[list[Any]]:
        # Their size never follows from the number of actors: sums are rounded chunk by chunk.
        if size := self.experiment.config.chunk:
            return [clients[first : first + size] for first in range(0, len(clients), size)]
        count = max(min(CHUNKS, len(clients)), ceil(len(clients) / LARGEST_CHUNK))
        ends = [len(clients) * k // count for k in range(count + 1)]
        return [clients[first:last] for first, last in pairwise(ends)]  # of nearly equal size: all end together

    def _check_params(self, state: ServerState) -> None:
        """Raises Diverged if the server's step gave a parameter that is not finite."""
        if names := [name for name in self.received_names if not state.params[name].isfinite().all()]:
            remedy = "a smaller --method.lr" + " or --server.lr" * hasattr(self.task.server, "lr")
            raise Diverged.in_round(state.round, f"{names[0]} after the server's step", remedy)


def _nothing(shared: Params, population: int) -> RoundSum:
    """The sum over a cohort that is empty, as Poisson sampling may draw it."""
    zeros = np.zeros(sum(tensor.numel() for tensor in shared.values()))
    return RoundSum(zeros, 0.0, np.empty(0, CLIENT_STATS), population=population)


def _updated(bank: np.ndarray, shared: np.ndarray, total: RoundSum) -> np.ndarray:
    """The bank after a round whose clients were sent the shared tensors (P,)."""
    bank = bank.copy()
    for client, delta in zip(total.clients["client"].tolist(), total.require_deltas(), strict=True):
        bank[client] = shared + delta
    return bank


def _last_write(state: ServerState, client: int) -> int:
    """The round in which a client last wrote its private state; 0 for never."""
    return int(state.private[client]) if client < len(state.private) else 0


def _check_sum(total: RoundSum, round: int) -> None:
    """Raises Diverged if an update, or the loss of a client that took a step, is not finite."""
    if not np.isfinite(total.delta).all():
        raise Diverged.in_round(round, "an update")
    losses = total.clients["loss"][total.clients["steps"] > 0]
    if not np.isfinite(losses).all():
        raise Diverged.in_round(round, "the loss of a client")
