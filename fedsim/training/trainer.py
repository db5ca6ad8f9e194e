"""Trains chunks of clients."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.clients import Client, Population
from fedsim.errors import Diverged
from fedsim.methods import ClientContext, Method
from fedsim.params import Params, kept, moved, unflatten
from fedsim.registry import name_of
from fedsim.rng import numpy_rng, seed_for, torch_rng
from fedsim.servers import ClientUpdate
from fedsim.training.accumulator import Accumulator
from fedsim.training.client_store import PrivateState, Stored
from fedsim.training.expand import expanded
from fedsim.training.inputs import Inputs
from fedsim.training.malice import forged, forges, poisoned
from fedsim.training.models import Models
from fedsim.training.optimizer import Optimizer
from fedsim.training.private_steps import private_steps
from fedsim.training.received import Received, received_losses
from fedsim.training.rows import RuleInputs, TrainRows
from fedsim.training.stack import stack_size, train_stack
from fedsim.training.targets import Targets
from fedsim.training.task import Task, local_rows
from fedsim.training.train import train_client
from fedsim.training.transmit import clipping, protected, transmit
from fedsim.updates import CLIENT_STATS, ChunkSum

Rows = dict[int, np.ndarray]  # train rows by client
NO_ROWS = np.empty(0, np.int64)


class Chunk(NamedTuple):
    """Clients of a cohort that one call trains.

    Attributes:
        version: of the parameters that they received, by the number of rounds done.
        unicast: (n, Q) what `Server.unicast` gives each of them, flat; None under rules that do not unicast.
        bound: the largest norm of a delta in the sum; longer ones are scaled to it.
    """

    version: int
    clients: Stored
    unicast: np.ndarray | None = None
    bound: float = inf


@dataclass(frozen=True)
class TrainedStack:
    """The clients of a stack after their local training. The tensors are reused for the next stack.

    Attributes:
        rows: on which each trained in a local epoch.
        params: their shared and private tensors, and those that each was sent for itself, (M, *shape).
        inputs: what the rule gave them before training.
        losses: (M,) mean over each client's local steps, in nats; nan if it took none.
        received_losses: (M,) mean over each client's train rows before training, if the rule needs it; else nan.
        optimizer: each client's optimizer state by name, if the method keeps it from round to round.
        lost: what encoding has discarded of each client's updates before this round.
        method: the method as they have trained it, with their local epochs.
    """

    clients: list[int]
    rows: list[int]
    params: Params
    inputs: RuleInputs
    losses: list[float]
    received_losses: list[float]
    optimizer: list[Params]
    lost: list[Params]
    method: Method


class Trainer:
    """Trains the clients of a chunk, in stacks, and sums what they return."""

    def __init__(self, models: Models, clients: Population) -> None:
        self.models, self.clients = models, clients
        self.data, self.device = models.data, models.device
        self.trained_classes = partial(clients.trained_classes, self.data)  # of a round
        self.buffers = lru_cache(maxsize=4)(self._buffers)
        self.rule_tensors = lru_cache(maxsize=4)(self._rule_tensors)
        self.target_inputs = lru_cache(maxsize=1)(self._target_inputs)
        self.stores = lru_cache(maxsize=4)(lambda task: task.has_private_state(models.module(task)[1]))

    def train(
        self,
        task: Task,
        round: int,
        versions: dict[int, np.ndarray],
        broadcast: np.ndarray,
        chunk: Chunk,
    ) -> ChunkSum:
        """One round of a chunk of clients.

        Args:
            versions: (P,) all parameters as the server had them, by the number of rounds done; private ones are those
                of round 0.
            broadcast: what the server rule sends besides the parameters, flat.
        """
        version, clients, unicast, bound = chunk
        like = self.models.module(task)[1]
        client_state, broadcast_like, unicast_like = self.rule_tensors(task)
        sent_alone = [] if unicast is None else zip(clients, unicast, strict=True)
        received = Received(
            version + 1,
            task.received(moved(unflatten(versions[version], like), self.device)),
            moved(unflatten(broadcast, broadcast_like), self.device, task.dtype),
            {client: task.received(unflatten(row, unicast_like)) for (client, _), row in sent_alone},
        )
        shared = task.select(received.params, "shared")
        rows_of = {client: self.clients.train_rows(client, received.round, self.data) for client, _ in clients}
        rule, lr, stats = task.server, task.lr(received.round), []
        total = Accumulator(shared, self.device, not rule.needs_deltas, task.keeps_deltas, task.codec.sums)
        for stack in self.train_stacks(task, round, received, clients, rows_of):
            contexts = self._contexts(task, received.round, stack.clients, rows_of)
            at_server = moved({n: stack.params[n] for n in shared}, self.device, "float64" if task.codec.sums else None)
            replies = []  # summed before the loop continues, because the tensors of a stack are reused for the next one
            for k, client in enumerate(stack.clients):
                rows = len(rows_of[client])
                steps = stack.method.steps(stack.rows[k]) * bool(stack.params)
                trained = {name: stack.params[name][k] for name in shared}
                staleness = round - 1 - version
                old = shared | {name: tensor[k] for name, tensor in stack.inputs.unicast.items()}
                trained = forged(task, self.clients.trainers, round, client, old, trained)
                result = old, trained, stack.inputs.states[k], received.sent, rows, steps, staleness, stack.method, lr
                update = ClientUpdate(*result, loss=stack.received_losses[k], client=contexts and contexts.part(k))
                reply = rule.reply(update)
                if reply.client_state.keys() != client_state.keys():
                    raise TypeError(f"{name_of(rule)}: the client_state of reply needs the names of init's")
                lost: Params = {}
                if task.privacy.protects_updates and not forges(task, self.clients.trainers, client):
                    trained = protected(task.privacy, old, trained, torch_rng(task.seed, "privacy", round, client))
                if not task.codec.lossless:
                    rng = torch_rng(task.seed, "codec", round, client)
                    trained, lost = transmit(task.codec, old, trained, stack.lost[k], rng, reply.weight > 0)
                if task.recodes and rule.computes_messages:
                    reply = replace(reply, message=rule.reply(replace(update, trained=trained)).message)
                if bound < inf:  # as a weight, so that in float64 no delta is longer
                    reply = replace(reply, weight=reply.weight * clipping(old, trained, bound))
                if self.stores(task):
                    self._write_private(task, round, stack, k, reply.client_state, lost)
                if task.recodes:
                    for name, tensor in trained.items():  # only now, since a client stores what it has trained
                        at_server[name][k] = tensor
                replies.append(reply)
                stats.append((client, rows, steps, stack.losses[k], reply.weight))
            total.add(stack.clients, at_server, replies, stack.inputs.held)
        return total.sum(np.sort(np.array(stats, CLIENT_STATS), order="client"), round)

    def train_stacks(
        self, task: Task, round: int, received: Received, clients: Stored, rows_of: Rows
    ) -> Iterator[TrainedStack]:
        """The clients after their local training of a round, stack by stack."""
        # Clients with similar numbers of rows share a stack, so that most of their batches have equal sizes.
        rows = {client: local_rows(task.method, self.data, rows_of[client]) for client, _ in clients}
        ordered = sorted(clients, key=lambda pair: (-rows[pair[0]], pair[0]))
        own = task.select(received.params, "shared", "private")
        tower_bytes = self.models.tower_bytes(task)
        of_rows = task.method.batch_size * (task.privacy.protects == "rows")
        size = 1 if task.reference else stack_size(own, task.method, self.device, tower_bytes, of_rows)
        by_classes = bool(tower_bytes) and size > 1
        for part in self._parts(task, received.round, ordered, rows_of, by_classes):
            for first in range(0, len(part), size):
                yield self._train_stack(task, round, received, part[first : first + size], rows_of)

    def _parts(self, task: Task, round: int, clients: Stored, rows_of: Rows, by_classes: bool) -> list[Stored]:
        """The clients by local epochs, and perhaps by active classes: those of a stack encode equally many texts."""
        rows = [rows_of[client] for client, _ in clients]
        masks = task.competing(self.data, self.trained_classes(round), rows) if by_classes else None
        counts = [0] * len(rows) if masks is None else masks.sum(axis=1).tolist()
        parts: dict[tuple[int | None, int], Stored] = {}
        for pair, count in zip(clients, counts, strict=True):
            parts.setdefault((task.device(pair[0], self.clients.trainers).epochs, count), []).append(pair)
        return list(parts.values())

    @torch.no_grad()
    def _train_stack(self, task: Task, round: int, received: Received, clients: Stored, rows_of: Rows) -> TrainedStack:
        module = self.models.learning(task, received.round)
        module.train()  # `evaluate` leaves it in eval mode, and which calls came before depends on scheduling
        # For each stack again, since a module may change its buffers while it trains one.
        if constants := task.select(received.params, "server", "frozen", "surveyed"):
            module.load_state_dict(constants, strict=False)
        params, optimizer = self.buffers(task, len(clients))
        optimizer.reset(task.lr(received.round))
        inputs, lost = self._start(task, round, received, clients, params, optimizer)
        ids = [client for client, _ in clients]
        rows = self._train_rows(task, round, received.round, ids, rows_of)
        if task.method.expands:
            rows = expanded(task, module, ids, rows)
        rngs = [torch_rng(task.seed, "batches", round, client) for client in ids]
        method = task.on(task.device(ids[0], self.clients.trainers))  # those of a stack have the same local epochs
        private = private_steps(task, round, ids)
        # For modules that draw random numbers, such as dropout. vmap refuses them; a client that trains through a tower
        # alone may draw.
        draws = task.reference or task.method.reads.towers
        with torch.random.fork_rng(devices=[], enabled=draws):
            if draws:
                torch.manual_seed(seed_for(task.seed, "noise", round, ids[0]))
            before = [float("nan")] * len(ids)
            if task.server.needs_loss:
                # Targets of their own, so that training draws the same.
                own = replace(rows, targets=self._targets(task, round, ids))
                before = received_losses(module, params, own, task.method)
            what = rows, method, task.server, inputs
            if task.reference:
                with torch.enable_grad():
                    losses = [train_client(module, optimizer, *what, rngs[0], private)]
            else:
                losses = train_stack(module, params, optimizer, *what, rngs, private).tolist()
        stored = range(len(ids)) if task.method.persist_optimizer else ()
        moments = [optimizer.moments(k) for k in stored]
        return TrainedStack(ids, rows.sizes, params, inputs, losses, before, moments, lost, method)

    def _start(
        self, task: Task, round: int, received: Received, clients: Stored, params: Params, optimizer: Optimizer
    ) -> tuple[RuleInputs, list[Params]]:
        """Sets the tensors and the optimizer of a stack to those with which its clients start; returns what the rule
        gives them, and what encoding has discarded of each client's updates before.
        """
        for name in params:
            params[name].copy_(received.params[name])
        shared = task.select(received.params, "shared")
        common = dict(shared)  # the tensors with which all clients of the stack start alike
        trainers = self.clients.trainers
        held = [task.held(shared, task.device(client, trainers), round, client) for client, _ in clients]
        # As they were sent: `start` may replace tensors of `params`.
        unlike = {name for own in (*held, received.unicast.get(clients[0][0], {})) for name in own}
        sent_each = {name: torch.empty_like(params[name]) for name in shared if name in unlike}
        states, lost = [], []
        for k, (client, written) in enumerate(clients):
            private = self.models.private(task, client, written)
            unicast = received.unicast.get(client, {})
            started = task.server.start(shared, torch_rng(task.seed, "start", round, client))
            sent = kept(shared | unicast, held[k])
            for name, tensor in sent_each.items():
                tensor[k] = sent[name]
                common.pop(name, None)
            for name, tensor in (unicast | started | task.select(private.params, "private")).items():
                params[name][k] = tensor
                common.pop(name, None)
            for name, mask in held[k].items():
                params[name][k] *= mask
            if private.optimizer:
                optimizer.load(k, private.optimizer)
            states.append(private.rule or self.rule_tensors(task)[0])
            lost.append(private.lost)
        return RuleInputs(common, sent_each, states, received.sent, held), lost

    def _train_rows(self, task: Task, round: int, learning: int, clients: list[int], rows_of: Rows) -> TrainRows:
        """The train rows of a stack of clients.

        Args:
            round: which keys what is drawn.
            learning: the round of the parameters that the clients received.
        """
        own = [rows_of[client] for client in clients]
        rows = np.concatenate(own)
        labels, attacked = poisoned(task, self.data, self.trained_classes(), self.clients.trainers, clients, rows_of)
        masks = task.competing(self.data, self.trained_classes(learning), own)
        return TrainRows(
            x=self._inputs(task, rows, self._views(task, round, clients, rows_of), attacked),
            y=torch.from_numpy(labels).to(self.device),
            sizes=[len(each) for each in own],
            classes=None if masks is None else torch.from_numpy(masks).to(self.device),
            client=self._contexts(task, learning, clients, rows_of),
            targets=self._targets(task, round, clients),
            group=self.models.groups(task, rows),
        )

    def _contexts(self, task: Task, round: int, clients: list[int], rows_of: Rows) -> ClientContext | None:
        """That of a stack of clients, for methods that read it."""
        return self.models.contexts.of(task, round, [Client(k, rows_of[k], NO_ROWS, NO_ROWS) for k in clients])

    def _targets(self, task: Task, round: int, clients: list[int]) -> Targets | None:
        """The test rows of the held-out domains, without their labels, for methods that read them."""
        if not task.method.reads_target:
            return None
        # Keyed apart from the batches: a method that does not read targets keeps its bits.
        return Targets(self.target_inputs(task), [torch_rng(task.seed, "target", round, k) for k in clients])

    def _target_inputs(self, task: Task) -> Tensor | Inputs:
        """Those of all target rows, which are the same for every stack and in every round."""
        return self._inputs(task, np.concatenate([*self.clients.held_out]))

    def _inputs(self, task: Task, rows: np.ndarray, *more: np.ndarray | None) -> Tensor | Inputs:
        """The inputs of some rows: features at once, since they are small; images may not fit into memory."""
        x = self.models.inputs(task, rows, *more)
        return x.whole() if x.name == "features" else x

    def _views(self, task: Task, round: int, clients: list[int], rows_of: Rows) -> np.ndarray | None:
        """The augmented view of each train row in a round; None without augmentation."""
        count = self.data.representations.views
        if count == 1:
            return None
        views = [numpy_rng(task.seed, "views", round, k).integers(1, count, len(rows_of[k])) for k in clients]
        return np.concatenate(views)

    def _write_private(self, task: Task, round: int, stack: TrainedStack, k: int, rule: Params, lost: Params) -> None:
        """Stores the private state of the stack's k-th client after a round."""
        client = stack.clients[k]
        stored = stack.params if task.server.unicasts else task.select(stack.params, "private")
        private = PrivateState(
            params={name: tensor[k] for name, tensor in stored.items()},
            optimizer=stack.optimizer[k] if task.method.persist_optimizer else {},
            rule=rule,
            lost=lost,
        )
        tensors = private.tensors()
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise Diverged.in_round(round, f"the private state of client {client}")
        if tensors or task.method.persist_optimizer:
            assert task.private is not None
            task.private.write(client, round, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    def _rule_tensors(self, task: Task) -> tuple[Params, Params, Params]:
        """A client's first memory for the rule; and what `broadcast` and `unicast` give, for its names and shapes."""
        like = self.models.module(task)[1]
        shared = task.select(like, "shared")
        slots, client_state = task.server.init(shared)
        if client_state:  # it may depend on the values of round 0, which the module no longer has after an evaluation
            backbone = self.models.backbone(task)
            backbone = replace(backbone, class_embeddings=backbone.class_embeddings.float())  # as the driver built it
            first = task.build(backbone).to(getattr(torch, task.dtype)).state_dict()
            _, client_state = task.server.init({name: first[name] for name in shared})
        return moved(client_state, self.device), task.server.broadcast(slots, shared), task.unicast_like(like)

    def _buffers(self, task: Task, clients: int) -> tuple[Params, Optimizer]:
        """The tensors of a stack, reused because fresh memory is slow; on the readable path those of the module."""
        module, _ = self.models.module(task)
        state = module.state_dict()
        params = task.select(state, "shared", "private") | {name: state[name] for name in self.rule_tensors(task)[2]}
        params = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        if not task.reference:
            params = {
                name: torch.empty_like(tensor.expand(clients, *tensor.shape[1:])) for name, tensor in params.items()
            }
        return params, Optimizer(task.method, {name: params[name] for name in self.models.parameters(task)})
