"""Trains chunks of clients."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedsim.clients import Client, Population
from fedsim.errors import Diverged
from fedsim.methods import trained
from fedsim.params import Params, moved, unflatten
from fedsim.registry import name_of
from fedsim.rng import numpy_rng, seed_for, torch_rng
from fedsim.servers import ClientUpdate
from fedsim.training.accumulator import Accumulator
from fedsim.training.client_store import PrivateState, Stored
from fedsim.training.contexts import ClientContexts
from fedsim.training.models import Models
from fedsim.training.optimizer import Optimizer
from fedsim.training.stack import stack_size, train_stack
from fedsim.training.task import Task
from fedsim.training.train import train_client
from fedsim.updates import CLIENT_STATS, ChunkSum

Rows = dict[int, np.ndarray]  # train rows by client
NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True)
class TrainedStack:
    """The clients of a stack after their local training. The tensors are reused for the next stack.

    Attributes:
        params: their shared and private tensors, (M, *shape).
        losses: (M,) mean over each client's local steps, in nats; nan if it took none.
        optimizer: each client's optimizer state by name, if the method keeps it from round to round.
        rule: each client's memory for the server rule, before this round.
    """

    clients: list[int]
    params: Params
    losses: list[float]
    optimizer: list[Params]
    rule: list[Params]


class Trainer:
    """Trains the clients of a chunk, in stacks, and sums what they return."""

    def __init__(self, models: Models, clients: Population) -> None:
        self.models, self.clients = models, clients
        self.data, self.device = models.data, models.device
        self.trained_classes = clients.trained_classes(self.data)
        self.contexts = ClientContexts(self.data, clients, self.device)
        self.buffers = lru_cache(maxsize=4)(self._buffers)
        self.rule_tensors = lru_cache(maxsize=4)(self._rule_tensors)
        self.stores = lru_cache(maxsize=4)(lambda task: task.has_private_state(models.module(task)[1]))

    def train(
        self,
        task: Task,
        round: int,
        versions: dict[int, np.ndarray],
        broadcast: np.ndarray,
        chunk: tuple[int, Stored],
    ) -> ChunkSum:
        """One round of a chunk of clients.

        Args:
            versions: (P,) all parameters as the server had them, by the number of rounds done; private ones are those
                of round 0.
            broadcast: what the server rule sends besides the parameters, flat.
            chunk: the version that the clients received, and the clients.
        """
        version, clients = chunk
        sent_in = version + 1  # the round in which the clients were sent the parameters
        like = self.models.module(task)[1]
        received = moved(unflatten(versions[version], like), self.device)
        shared = task.select(received, "shared")
        client_state, broadcast_like = self.rule_tensors(task)
        sent = moved(unflatten(broadcast, broadcast_like), self.device, task.dtype)
        rows_of = {client: self.clients[client].train for client, _ in clients}
        total = Accumulator(shared, self.device, task.server.needs_deltas)
        stats = []
        for stack in self._train_stacks(task, round, sent_in, received, sent, clients, rows_of):
            replies = []  # summed before the loop continues, because the tensors of a stack are reused for the next one
            for k, client in enumerate(stack.clients):
                rows = len(rows_of[client])
                steps = task.method.steps(rows) * bool(stack.params)
                trained = {name: stack.params[name][k] for name in shared}
                staleness = round - 1 - version
                update = ClientUpdate(
                    shared, trained, stack.rule[k], sent, rows, steps, staleness, task.method, task.lr(sent_in)
                )
                reply = task.server.reply(update)
                if reply.client_state.keys() != client_state.keys():
                    raise TypeError(f"{name_of(task.server)}: the client_state of reply needs the names of init's")
                if self.stores(task):
                    self._write_private(task, round, stack, k, reply.client_state)
                replies.append(reply)
                stats.append((client, rows, steps, stack.losses[k], reply.weight))
            total.add(stack.clients, {name: stack.params[name] for name in shared}, replies)
        return total.sum(np.sort(np.array(stats, CLIENT_STATS), order="client"), round)

    def _train_stacks(
        self, task: Task, round: int, sent_in: int, received: Params, sent: Params, clients: Stored, rows_of: Rows
    ) -> Iterator[TrainedStack]:
        # Clients with similar numbers of rows share a stack, so that most of their batches have equal sizes.
        ordered = sorted(clients, key=lambda pair: (-len(rows_of[pair[0]]), pair[0]))
        size = 1 if task.reference else stack_size(task.select(received, "shared", "private"), task.method, self.device)
        for first in range(0, len(ordered), size):
            yield self._train_stack(task, round, sent_in, received, sent, ordered[first : first + size], rows_of)

    @torch.no_grad()
    def _train_stack(
        self, task: Task, round: int, sent_in: int, received: Params, sent: Params, clients: Stored, rows_of: Rows
    ) -> TrainedStack:
        module, _ = self.models.module(task)
        module.train()  # `evaluate` leaves it in eval mode, and which calls came before depends on scheduling
        # For each stack again, since a module may change its buffers while it trains one.
        if constants := task.select(received, "server", "frozen"):
            module.load_state_dict(constants, strict=False)
        params, optimizer = self.buffers(task, len(clients))
        optimizer.reset(task.lr(sent_in))
        for name in params:
            params[name].copy_(received[name])
        shared = task.select(received, "shared")
        common = dict(shared)  # the tensors with which all clients of the stack start alike
        states = []
        for k, (client, written) in enumerate(clients):
            private = self.models.private(task, client, written)
            started = task.server.start(shared, torch_rng(task.seed, "start", round, client))
            for name, tensor in (started | private.params).items():
                params[name][k] = tensor
                common.pop(name, None)
            if private.optimizer:
                optimizer.load(k, private.optimizer)
            states.append(private.rule or self.rule_tensors(task)[0])
        ids = [client for client, _ in clients]
        rows = np.concatenate([rows_of[client] for client in ids])
        x = self.models.inputs(task, rows, self._views(task, round, ids, rows_of))
        if x.name == "features":  # small, and read in every epoch; images may not fit into memory
            x = x.whole()
        y = torch.from_numpy(self.data.y[rows]).to(self.device)
        rngs = [torch_rng(task.seed, "batches", round, client) for client in ids]
        classes = self._classes(task, ids, rows_of)
        context = self.contexts.of(task, sent_in, [Client(k, rows_of[k], NO_ROWS, NO_ROWS) for k in ids])
        # For modules that draw random numbers, such as dropout. vmap refuses them; a stack that trains through a tower
        # is one client.
        draws = task.reference or task.method.reads.towers
        with torch.random.fork_rng(devices=[], enabled=draws):
            if draws:
                torch.manual_seed(seed_for(task.seed, "noise", round, ids[0]))
            if task.reference:
                own = None if classes is None else classes[0]
                options = {"shared": list(common), "client_state": states[0], "sent": sent, "classes": own}
                options["client"] = context and context.part(0)
                with torch.enable_grad():
                    losses = [train_client(module, optimizer, x, y, task.method, task.server, rngs[0], **options)]
            else:
                sizes = [len(rows_of[client]) for client in ids]
                options = task.method, task.server, rngs, states, sent, classes, context
                losses = train_stack(module, params, optimizer, common, x, y, sizes, *options).tolist()
        stored = range(len(ids)) if task.method.persist_optimizer else ()
        return TrainedStack(ids, params, losses, [optimizer.moments(k) for k in stored], states)

    def _classes(self, task: Task, clients: list[int], rows_of: Rows) -> Tensor | None:
        """(M, C) bool, the classes that compete in each client's loss; None where all do."""
        if task.method.label_space == "client":
            masks = np.zeros((len(clients), len(self.data.classes)), bool)
            for mask, k in zip(masks, clients, strict=True):
                mask[self.data.y[rows_of[k]]] = True  # not the classes that only its test rows show
        elif self.data.class_domain or not self.trained_classes.all():
            masks = np.stack([self.trained_classes & self.data.competing(rows_of[k]) for k in clients])
        else:
            return None
        return torch.from_numpy(masks).to(self.device)

    def _views(self, task: Task, round: int, clients: list[int], rows_of: Rows) -> np.ndarray | None:
        """The augmented view of each train row in a round; None without augmentation."""
        count = self.data.representations.views
        if count == 1:
            return None
        views = [numpy_rng(task.seed, "views", round, k).integers(1, count, len(rows_of[k])) for k in clients]
        return np.concatenate(views)

    def _write_private(self, task: Task, round: int, stack: TrainedStack, k: int, rule: Params) -> None:
        """Stores the private state of the stack's k-th client after a round."""
        client = stack.clients[k]
        private = PrivateState(
            params={name: tensor[k] for name, tensor in task.select(stack.params, "private").items()},
            optimizer=stack.optimizer[k] if task.method.persist_optimizer else {},
            rule=rule,
        )
        tensors = private.tensors()
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise Diverged.in_round(round, f"the private state of client {client}")
        if tensors or task.method.persist_optimizer:
            assert task.private is not None
            task.private.write(client, round, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    def _rule_tensors(self, task: Task) -> tuple[Params, Params]:
        """A client's first memory for the server rule; and what the rule sends, for its names and shapes."""
        shared = task.select(self.models.module(task)[1], "shared")
        slots, client_state = task.server.init(shared)
        return moved(client_state, self.device), task.server.broadcast(slots, shared)

    def _buffers(self, task: Task, clients: int) -> tuple[Params, Optimizer]:
        """The tensors of a stack, reused because fresh memory is slow; on the readable path those of the module."""
        module, _ = self.models.module(task)
        params = task.select(module.state_dict(), "shared", "private")
        params = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        if not task.reference:
            params = {
                name: torch.empty_like(tensor.expand(clients, *tensor.shape[1:])) for name, tensor in params.items()
            }
        return params, Optimizer(task.method, {name: params[name] for name in trained(module)})
