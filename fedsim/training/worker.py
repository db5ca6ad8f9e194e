"""Trains and evaluates chunks of clients, in an actor or in the driver's own process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.clients import Client, Population
from fedsim.clip.model import Clip, Frozen
from fedsim.counts import Counts, tally
from fedsim.errors import Diverged, InputError
from fedsim.methods import trained
from fedsim.params import Params, unflatten
from fedsim.registry import name_of
from fedsim.representations import Encoded
from fedsim.rng import numpy_rng, seed_for, torch_rng
from fedsim.servers import ClientUpdate
from fedsim.training.accumulator import Accumulator
from fedsim.training.client_store import PrivateState
from fedsim.training.contexts import ClientContexts
from fedsim.training.inputs import Inputs
from fedsim.training.optimizer import Optimizer
from fedsim.training.predict import Entry, Spaces, predict
from fedsim.training.stack import stack_size, train_stack
from fedsim.training.task import Task, backbone_of
from fedsim.training.train import train_client
from fedsim.updates import CLIENT_STATS, ChunkSum

Stored = list[tuple[int, int]]  # ids of clients, each with the round that last wrote its private state, or 0
Rows = dict[int, np.ndarray]  # train rows by client
NO_ROWS = np.empty(0, np.int64)
RESIDENT_BYTES = 1 << 30  # the features that a worker holds on its GPU take at most this


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


class ClientWorker:
    """Trains and evaluates chunks of clients. A chunk is pure: the same call gives the same bits anywhere."""

    def __init__(self, data: Encoded, clients: Population, frozen: Frozen | None = None, device: str = "cpu") -> None:
        """
        Args:
            frozen: CLIP, for methods that train through its towers.
            device: cpu or cuda.
        """
        self.data = data
        self.clients = clients
        self.frozen = frozen
        self.device = device
        self.trained_classes = clients.trained_classes(data)
        self.contexts = ClientContexts(data, clients, device)
        self.clip = lru_cache(maxsize=1)(self._clip)
        self.module = lru_cache(maxsize=4)(self._module)
        self.buffers = lru_cache(maxsize=4)(self._buffers)
        self.resident = lru_cache(maxsize=1)(self._resident)
        self.rule_tensors = lru_cache(maxsize=4)(self._rule_tensors)
        self.stores = lru_cache(maxsize=4)(lambda task: task.has_private_state(self.module(task)[1]))

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
        like = self.module(task)[1]
        received = _to(self.device, unflatten(versions[version], like))
        shared = task.select(received, "shared")
        client_state, broadcast_like = self.rule_tensors(task)
        sent = _to(self.device, unflatten(broadcast, broadcast_like), task.dtype)
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

    def evaluate(
        self,
        task: Task,
        round: int,
        params: np.ndarray,
        shared_rows: Sequence[int],
        held_out: Sequence[int],
        splits: Sequence[str],
        chunk: Stored,
    ) -> Counts:
        """Counts of a chunk of clients on their own validation and test rows.

        Args:
            params: (P,) all parameters as the server has them.
            shared_rows: ids of clients that do not train; every client of the chunk is evaluated on their rows too.
            held_out: indices of the held-out domains.
            splits: those of `counts.SPLITS` that are evaluated; rows of the others are not read.

        Raises:
            Diverged: a prediction is NaN, after some rounds of training.
            InputError: the same in round 0.
        """
        module, like = self.module(task)
        received = _to(self.device, unflatten(params, like))
        module.eval().load_state_dict(received)
        entries, predictions = [], []
        reads, joint = task.method.reads.image, task.method.joint_classes
        model = partial(task.method.logits, module)
        predictions_of = partial(predict, model, partial(self._read, task), reads, joint, device=self.device)
        others = [self.clients[k] for k in shared_rows]
        for k, written in chunk:
            client = self.clients[k]
            parts = [("val", client.val, client), (client.split, client.test, client)]
            parts += [(other.split, other.test, other) for other in others]
            for split, rows, owner in parts:
                if split in splits:
                    entries += [self._entry(task, round, k, split, own, owner) for own in self._by_vocabulary(rows)]
            if task.select(like, "private"):
                module.load_state_dict(received | self._read_private(task, k, written).params)
                predictions += predictions_of(entries[len(predictions) :])
        predictions += predictions_of(
            entries[len(predictions) :]
        )  # without private parameters: one model, all rows at once
        predicted, predicted_own, confidence = (
            np.concatenate([np.empty(0, np.int64), *parts]) for parts in zip(*predictions, strict=True)
        )
        if not np.isfinite(confidence).all():
            if not round:
                raise InputError(f"method {name_of(task.method)} predicts NaN before it is trained")
            raise Diverged.in_round(round, "a prediction of the trained model")
        return tally([entry for entry, *_ in entries], predicted, predicted_own, confidence, self.data, held_out)

    def _entry(self, task: Task, round: int, k: int, split: str, rows: np.ndarray, owner: Client) -> Entry:
        """Some rows of `owner`, to be predicted with the parameters of client k."""
        context = self.contexts.of(task, round, [owner])
        return (k, split, rows), self._spaces(owner, rows), context and context.part(0)

    def _by_vocabulary(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows in parts for which the same classes compete: in a suite, those of each data set."""
        if not self.data.class_domain or not len(rows):
            return [rows]
        domain = self.data.domain[rows]
        return [rows[domain == each] for each in np.unique(domain)]

    def _spaces(self, client: Client, rows: np.ndarray) -> Spaces:
        own = self.clients.classes_of(client, self.data)
        protocol = own if client.split == "new" else self.trained_classes
        competing = self.data.competing(rows)
        return torch.from_numpy(protocol & competing), torch.from_numpy(own & competing)

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
        module, _ = self.module(task)
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
            private = self._read_private(task, client, written)
            started = task.server.start(shared, torch_rng(task.seed, "start", round, client))
            for name, tensor in (started | private.params).items():
                params[name][k] = tensor
                common.pop(name, None)
            if private.optimizer:
                optimizer.load(k, private.optimizer)
            states.append(private.rule or self.rule_tensors(task)[0])
        ids = [client for client, _ in clients]
        rows = np.concatenate([rows_of[client] for client in ids])
        x = self._inputs(task, rows, self._views(task, round, ids, rows_of))
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

    def _read_private(self, task: Task, client: int, written: int) -> PrivateState:
        """A client's private state; empty before its first round."""
        if not written:
            return PrivateState()
        assert task.private is not None
        return PrivateState.from_tensors(_to(self.device, task.private.read(client, written)))

    def _read(self, task: Task, rows: np.ndarray) -> Tensor:
        return self._inputs(task, rows).whole()

    def _inputs(self, task: Task, rows: np.ndarray, views: np.ndarray | None = None) -> Inputs:
        name, dtype = task.method.reads.image, getattr(torch, task.dtype)
        held = self.resident() if name == "features" and views is None else None
        return Inputs(self.data.representations, name, rows, views, self.device, dtype, held)

    def _resident(self) -> Tensor | None:
        """All features on a GPU if they fit, so that rows are not copied there in every round."""
        x = self.data.representations.features
        if self.device == "cpu" or self.data.rows_per_client or x.nbytes > RESIDENT_BYTES:
            return None
        return torch.tensor(x, device=self.device)

    def _rule_tensors(self, task: Task) -> tuple[Params, Params]:
        """A client's first memory for the server rule; and what the rule sends, for its names and shapes."""
        shared = task.select(self.module(task)[1], "shared")
        slots, client_state = task.server.init(shared)
        return _to(self.device, client_state), task.server.broadcast(slots, shared)

    def _buffers(self, task: Task, clients: int) -> tuple[Params, Optimizer]:
        """The tensors of a stack, reused because fresh memory is slow; on the readable path those of the module."""
        module, _ = self.module(task)
        params = task.select(module.state_dict(), "shared", "private")
        params = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        if not task.reference:
            params = {
                name: torch.empty_like(tensor.expand(clients, *tensor.shape[1:])) for name, tensor in params.items()
            }
        return params, Optimizer(task.method, {name: params[name] for name in trained(module)})

    def _module(self, task: Task) -> tuple[nn.Module, Params]:
        reads = task.method.reads
        clip = self.clip(task.dtype) if reads.towers else None
        backbone = backbone_of(self.data, self.device, task.dtype, reads, clip)
        module = task.build(backbone).to(self.device, getattr(torch, task.dtype))
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.contiguous()  # the fused optimizers walk raw memory
        like = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
        return module, like

    def _clip(self, dtype: str) -> Clip:
        assert self.frozen is not None
        clip = self.frozen.open(self.device)
        clip.model.to(getattr(torch, dtype))
        return clip


def _to(device: str, params: Params, dtype: str | None = None) -> Params:
    return {name: tensor.to(device, getattr(torch, dtype) if dtype else None) for name, tensor in params.items()}
