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
from fedsim.datasets import Features
from fedsim.errors import InputError
from fedsim.methods import trained
from fedsim.params import Params, unflatten
from fedsim.rng import numpy_rng, seed_for, torch_rng
from fedsim.servers import ClientUpdate
from fedsim.training.accumulator import Accumulator
from fedsim.training.inputs import Inputs
from fedsim.training.judge import Space, judge
from fedsim.training.optimizer import Optimizer
from fedsim.training.stack import stack_size, train_stack
from fedsim.training.task import Task, backbone_of
from fedsim.training.train import train_client
from fedsim.updates import CLIENT_STATS, ChunkSum

Written = list[tuple[int, int]]  # ids of clients, each with the round that wrote what it keeps, or 0
Rows = dict[int, np.ndarray]  # train rows by client
MOMENTS, RULE = "optimizer/", "rule/"  # before the names of what a client keeps beside its private parameters
RESIDENT_BYTES = 1 << 30  # of features that a worker holds on its GPU


@dataclass(frozen=True)
class Fits:
    """Some clients after their share of a round; the tensors are lent until the next ones are trained.

    Attributes:
        params: what each has of its own or sends, (M, *shape).
        losses: (M,) mean over each client's local steps, in nats; nan when it took none.
        moments: what each client's optimizer remembers, by name; of methods that keep it.
        rule: what each kept for the server rule, as it came.
    """

    clients: list[int]
    params: Params
    losses: list[float]
    moments: list[Params]
    rule: list[Params]


class ClientWorker:
    """Trains and evaluates chunks of clients. A chunk is pure: the same call gives the same bits anywhere."""

    def __init__(
        self, features: Features, clients: Population, frozen: Frozen | None = None, device: str = "cpu"
    ) -> None:
        """
        Args:
            frozen: CLIP, for methods that train through its towers.
        """
        self.features = features
        self.clients = clients
        self.frozen = frozen
        self.device = device
        self.trained_classes = clients.trained_classes(features)
        self.clip = lru_cache(maxsize=1)(self._clip)
        self.module = lru_cache(maxsize=4)(self._module)
        self.room = lru_cache(maxsize=4)(self._room)
        self.resident = lru_cache(maxsize=1)(self._resident)
        self.rule = lru_cache(maxsize=4)(self._rule)

    def train(
        self,
        task: Task,
        round: int,
        sent: dict[int, np.ndarray],
        broadcast: np.ndarray,
        chunk: tuple[int, Written],
    ) -> ChunkSum:
        """One round of a chunk of clients.

        Args:
            sent: (P,) all parameters, private ones as in round 0, as the server had them, by rounds done.
            broadcast: what the server rule sends besides them.
            chunk: which of the parameters the clients got, and who they are.
        """
        version, clients = chunk
        like = self.module(task)[1]
        received = _to(self.device, unflatten(sent[version], like))
        shared = task.of(received, "shared")
        initial, names = self.rule(task)
        told = _to(self.device, unflatten(broadcast, names), task.dtype)
        rows_of = {client: self.clients[client].train for client, _ in clients}
        sums = Accumulator(shared, self.device, task.server.sees_each)
        keeps = task.method.persist_optimizer or bool(initial) or bool(task.of(like, "private"))
        notes = []
        for fits in self._fits(task, round, received, told, clients, rows_of):
            weights, messages = [], []
            for place, client in enumerate(fits.clients):
                rows = len(rows_of[client])
                steps = task.method.steps(rows) * bool(fits.params)
                after = {name: fits.params[name][place] for name in shared}
                state, staleness = fits.rule[place], round - 1 - version
                update = ClientUpdate(shared, after, state, told, rows, steps, staleness, task.method)
                reply = task.server.reply(update)
                if keeps:
                    self._keep(task, round, client, fits, place, reply.client_state)
                weights.append(reply.weight)
                messages.append(reply.message)
                notes.append((client, rows, steps, fits.losses[place], reply.weight))
            sums.add(fits.clients, {name: fits.params[name] for name in shared}, messages, weights)
        return sums.sum(np.sort(np.array(notes, CLIENT_STATS), order="client"))

    def evaluate(
        self,
        task: Task,
        sent: np.ndarray,
        also: Sequence[int],
        held_out: Sequence[int],
        splits: Sequence[str],
        chunk: Written,
    ) -> Counts:
        """Counts of a chunk of clients on their own validation and test rows.

        Args:
            also: ids of clients that train nothing, on whose rows every client of the chunk is judged as well.
            held_out: indices of the held-out domains.
            splits: of `counts.SPLITS`; rows of others are not read.
        """
        module, like = self.module(task)
        received = _to(self.device, unflatten(sent, like))
        module.eval().load_state_dict(received)
        entries, answers = [], []
        reads, joint = task.method.reads.image, task.method.joint_classes
        ask = partial(judge, module, partial(self._read, task), reads, joint, device=self.device)
        others = [self.clients[k] for k in also]
        for k, written in chunk:
            client = self.clients[k]
            own = [("val", client.val, client), (client.split, client.test, client)]
            parts = own + [(one.split, one.test, one) for one in others]
            entries += [((k, split, rows), self._space(whose)) for split, rows, whose in parts if split in splits]
            if task.of(like, "private"):
                module.load_state_dict(received | self._kept(task, k, written)[0])
                answers += ask(entries[len(answers) :])
        answers += ask(entries[len(answers) :])  # by the shared model, all at once
        guesses, owns, confidence = (
            np.concatenate([np.empty(0, np.int64), *some]) for some in zip(*answers, strict=True)
        )
        return tally([entry for entry, _ in entries], guesses, owns, confidence, self.features, held_out)

    def _space(self, client: Client) -> Space:
        own = self.clients.classes_of(client, self.features)
        everyone = own if client.split == "new" else self.trained_classes
        return torch.from_numpy(everyone), torch.from_numpy(own)

    def _fits(
        self, task: Task, round: int, received: Params, told: Params, clients: Written, rows_of: Rows
    ) -> Iterator[Fits]:
        # Clients of like size together, so that their batches have one size for as many steps as can be.
        ordered = sorted(clients, key=lambda pair: (-len(rows_of[pair[0]]), pair[0]))
        size = 1 if task.reference else stack_size(task.of(received, "shared", "private"), task.method, self.device)
        for first in range(0, len(ordered), size):
            yield self._fit(task, round, received, told, ordered[first : first + size], rows_of)

    @torch.no_grad()
    def _fit(self, task: Task, round: int, received: Params, told: Params, clients: Written, rows_of: Rows) -> Fits:
        module, _ = self.module(task)
        module.train()  # evaluation leaves it otherwise, and which process has evaluated is chance
        if constants := task.of(received, "server", "frozen"):
            module.load_state_dict(constants, strict=False)
        params, optimizer = self.room(task, len(clients))
        optimizer.reset()
        shared = task.of(received, "shared")
        for name in params:
            params[name].copy_(received[name])
        rule = []
        alike = dict(shared)  # what all clients start from
        for place, (client, written) in enumerate(clients):
            own, moments, kept = self._kept(task, client, written)
            rng = torch_rng(task.seed, "start", round, client)
            for name, tensor in task.server.start(shared, rng).items():
                params[name][place] = tensor
                alike.pop(name, None)
            for name, tensor in own.items():
                params[name][place] = tensor
            if moments:
                optimizer.load(place, moments)
            rule.append(kept or self.rule(task)[0])
        ids = [client for client, _ in clients]
        rows = np.concatenate([rows_of[client] for client in ids])
        x = self._inputs(task, rows, self._views(task, round, ids, rows_of))
        if x.level == "features":  # few bytes, asked for again and again; images may not fit into memory
            x = x.whole()
        y = torch.from_numpy(self.features.y[rows]).to(self.device)
        rngs = [torch_rng(task.seed, "batches", round, client) for client in ids]
        classes = self._classes(task, ids)
        if task.reference:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_for(task.seed, "noise", round, ids[0]))  # of a module with dropout, say
                own = None if classes is None else classes[0]
                how = {"shared": list(alike), "client_state": rule[0], "sent": told, "classes": own}
                losses = [train_client(module, optimizer, x, y, task.method, task.server, rngs[0], **how)]
        else:
            sizes = [len(rows_of[client]) for client in ids]
            how = task.method, task.server, rngs, rule, told, classes
            losses = train_stack(module, params, optimizer, alike, x, y, sizes, *how).tolist()
        kept = range(len(ids)) if task.method.persist_optimizer else ()
        return Fits(ids, params, losses, [optimizer.moments(place) for place in kept], rule)

    def _classes(self, task: Task, clients: list[int]) -> Tensor | None:
        """(M, C) bool, the classes that compete in each client's loss; None where all do."""
        own = task.method.label_space == "client"
        if not own and self.trained_classes.all():
            return None
        masks = np.tile(self.trained_classes, (len(clients), 1))
        for mask, k in zip(masks, clients if own else (), strict=False):
            mask[:] = False
            mask[self.features.y[self.clients[k].train]] = True  # what only its test rows show is not for training
        return torch.from_numpy(masks).to(self.device)

    def _views(self, task: Task, round: int, clients: list[int], rows_of: Rows) -> np.ndarray | None:
        """Which augmented view each train row shows in a round; None where there is but the image itself."""
        most = self.features.augment + 1
        if most == 1:
            return None
        drawn = [numpy_rng(task.seed, "views", round, k).integers(1, most, len(rows_of[k])) for k in clients]
        return np.concatenate(drawn)

    def _keep(self, task: Task, round: int, client: int, fits: Fits, place: int, rule: Params) -> None:
        """Writes down what a client has of its own after a round."""
        kept = {name: tensor[place] for name, tensor in task.of(fits.params, "private").items()}
        kept |= {RULE + name: tensor for name, tensor in rule.items()}
        if task.method.persist_optimizer:
            kept |= {MOMENTS + name: tensor for name, tensor in fits.moments[place].items()}
        if not all(tensor.isfinite().all() for tensor in kept.values()):
            raise InputError(f"training diverged: in round {round} client {client} is not finite; try a smaller lr")
        if kept or task.method.persist_optimizer:
            task.private.write(client, round, {name: tensor.cpu().contiguous() for name, tensor in kept.items()})

    def _kept(self, task: Task, client: int, written: int) -> tuple[Params, Params, Params]:
        """A client's private parameters, what its optimizer remembers, and what it keeps for the server rule; none of
        them before its first round.
        """
        kept = _to(self.device, task.private.read(client, written)) if written else {}
        moments, rule = (
            {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}
            for prefix in (MOMENTS, RULE)
        )
        return {name: v for name, v in kept.items() if not name.startswith((MOMENTS, RULE))}, moments, rule

    def _read(self, task: Task, rows: np.ndarray) -> Tensor:
        return self._inputs(task, rows).whole()

    def _inputs(self, task: Task, rows: np.ndarray, views: np.ndarray | None = None) -> Inputs:
        level, dtype = task.method.reads.image, getattr(torch, task.dtype)
        held = self.resident() if level == "features" and views is None else None
        return Inputs(self.features, level, rows, views, self.device, dtype, held)

    def _resident(self) -> Tensor | None:
        """All features on a GPU, if they are few: rows are then not copied there again for each round."""
        x = self.features.x
        if self.device == "cpu" or self.features.block or x.nbytes > RESIDENT_BYTES:
            return None
        return torch.tensor(x, device=self.device)

    def _rule(self, task: Task) -> tuple[Params, Params]:
        """A client's memory for the server rule before its first round; names and shapes of what the rule sends."""
        shared = task.of(self.module(task)[1], "shared")
        slots, client_state = task.server.init(shared)
        return _to(self.device, client_state), task.server.broadcast(slots, shared)

    def _room(self, task: Task, clients: int) -> tuple[Params, Optimizer]:
        """Room for a stack, used again and again, since fresh memory is slow; for one client, its module's own."""
        module, _ = self.module(task)
        params = task.of(module.state_dict(), "shared", "private")
        params = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
        if not task.reference:
            params = {
                name: torch.empty_like(tensor.expand(clients, *tensor.shape[1:])) for name, tensor in params.items()
            }
        return params, Optimizer(task.method, {name: params[name] for name in trained(module)})

    def _module(self, task: Task) -> tuple[nn.Module, Params]:
        reads = task.method.reads
        clip = self.clip(task.dtype) if reads.towers else None
        backbone = backbone_of(self.features, self.device, task.dtype, reads, clip)
        module = task.build(backbone).to(self.device, getattr(torch, task.dtype))
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.contiguous()  # the fused optimizers walk raw memory
        like = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
        return module, like

    def _clip(self, dtype: str) -> Clip:
        clip = self.frozen.open(self.device)
        clip.model.to(getattr(torch, dtype))
        return clip


def _to(device: str, params: Params, dtype: str | None = None) -> Params:
    return {name: tensor.to(device, getattr(torch, dtype) if dtype else None) for name, tensor in params.items()}
