"""One client's share of a round, and a chunk of clients': stacked, or one after the other on the readable path."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.clients import Client, Population
from fedsim.clip import Clip, Frozen
from fedsim.counts import Counts, tally
from fedsim.datasets import Features
from fedsim.errors import InputError, listing
from fedsim.methods import Backbone, Method, Scope, trained
from fedsim.params import Params, flatten, unflatten, views
from fedsim.registry import name_of
from fedsim.rng import numpy_rng, seed_for, torch_rng
from fedsim.servers import NOTE, Partial, Server
from fedsim.sites import Reads
from fedsim.training.client_store import PrivateStore
from fedsim.training.optimizer import Optimizer
from fedsim.training.stack import Term, stack_size, train_stack

FEATURES = Reads()
Written = list[tuple[int, int]]  # ids of clients, each with the round that wrote what it keeps, or 0
Rows = dict[int, np.ndarray]  # train rows by client
Space = tuple[Tensor, Tensor]  # (C,) bool each: the classes of the protocol, and the client's own
Entry = tuple[tuple[int, str, np.ndarray], Space]  # a client is judged on rows of a split
Answers = tuple[np.ndarray, np.ndarray, np.ndarray]
MOMENTS, RULE = "optimizer/", "rule/"  # before the names of what a client keeps beside its private parameters
RESIDENT_BYTES = 1 << 30  # of features that a worker holds on its GPU
BLOCK = {"features": 4096, "tokens": 256, "pixels": 64}  # rows of one forward pass in evaluation, by what is read


@dataclass(frozen=True)
class Task:
    """What is the same for all clients of a run. With a client, a round and parameters it says everything.

    Attributes:
        method: as the server rule has it trained (`Server.fit`).
        private: where clients keep what does not travel.
        reference: train client by client, on the readable path.
    """

    method: Method
    server: Server
    seed: int
    dtype: str = "float32"
    private: PrivateStore | None = None
    reference: bool = False

    def scope(self, name: str) -> Scope:
        """Who has the tensor of this name."""
        return self.server.scope(name, self.method.scope(name))

    def of(self, params: Params, *scopes: Scope) -> Params:
        """The tensors of some scopes."""
        return {name: tensor for name, tensor in params.items() if self.scope(name) in scopes}

    def keeps(self, params: Params) -> bool:
        """Whether clients keep anything from round to round."""
        rule = self.server.keeps(self.of(params, "shared"))
        return self.method.keep_moments or bool(rule) or bool(self.of(params, "private"))

    def build(self, backbone: Backbone) -> nn.Module:
        """The module of round 0, the same in every process: PyTorch's default initialisation under the run's seed.

        Only what clients train carries gradients.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, "init"))
            module = self.method.build(backbone)
        for name, tensor in module.named_parameters():
            tensor.requires_grad_(self.scope(name) in ("shared", "private"))
        return module


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


@dataclass(frozen=True)
class Inputs:
    """What is kept of some rows, as a tensor that is read when it is indexed.

    Attributes:
        dtype: of all but pixels, which are bytes.
        resident: (N, D) all features, where the device holds them.
    """

    features: Features
    level: str
    rows: np.ndarray
    views: np.ndarray | None
    device: str
    dtype: torch.dtype
    resident: Tensor | None = None

    def whole(self) -> Tensor:
        return self[torch.arange(len(self.rows))]

    def __getitem__(self, places: Tensor) -> Tensor:
        """(*I) places among the rows -> (*I, ...)."""
        at = places.cpu().numpy()
        if self.resident is not None:
            return self.resident[torch.from_numpy(self.rows[at]).to(self.device)].to(self.dtype)
        taken = self.features.take(self.level, self.rows[at], None if self.views is None else self.views[at])
        x = torch.from_numpy(taken).to(self.device)
        return x if x.dtype == torch.uint8 else x.to(self.dtype)


def start(task: Task, backbone: Backbone, cohort: int = 1) -> Params:
    """The parameters of round 0, for rounds of so many clients."""
    module = task.build(backbone)
    dtype = getattr(torch, task.dtype)
    if whole := [name for name, tensor in module.state_dict().items() if not tensor.is_floating_point()]:
        raise InputError(f"{name_of(task.method)} has tensors that are no numbers to average: {listing(whole)}")
    params = {name: tensor.detach().clone().to(dtype) for name, tensor in module.state_dict().items()}
    if (of_server := task.of(params, "server")) and not task.server.moves_server:
        raise InputError(
            f"server {name_of(task.server)} does not move the tensors that a server alone changes, such as "
            f"{next(iter(of_server))}; of method lora leave --method.merged out"
        )
    task.server.check({n: tensor for n, tensor in params.items() if task.method.scope(n) == "shared"}, cohort)
    return params


def backbone_of(
    features: Features, device: str = "cpu", dtype: str = "float32", reads: Reads = FEATURES, clip: Clip | None = None
) -> Backbone:
    """What a method sees of the frozen CLIP: its prototypes, and those towers that are read."""
    prototypes = torch.tensor(features.prototypes, dtype=getattr(torch, dtype), device=device)
    texts = Backbone(prototypes, features.logit_scale, features.classes, features.prompt)
    return with_towers(texts, reads, clip)


def with_towers(backbone: Backbone, reads: Reads, clip: Clip | None) -> Backbone:
    """The same with the towers that are read."""
    text = clip.text_tower(reads.text == "blocks") if clip and reads.text != "prototypes" else None
    image = clip.image_tower() if clip and reads.image == "pixels" else None
    return replace(backbone, text_tower=text, image_tower=image)


def train_client(
    module: nn.Module,
    optimizer: Optimizer,
    x: Tensor | Inputs,
    y: Tensor,
    method: Method,
    term: Term,
    rng: torch.Generator,
    shared: Sequence[str] | None = None,
    correction: Params | None = None,
) -> float:
    """Trains the module in place on one client's rows: the readable path, which `stack.train_stack` must equal.

    Args:
        optimizer: over the module's trained parameters.
        x: (n, ...) what is read of the client's train rows.
        y: (n,) their classes.
        term: what the server rule adds to the loss, of the live parameters and of those that were received.
        rng: draws the order of the rows, epoch by epoch.
        shared: names of the tensors that were received; none given: all.
        correction: what the server rule adds to the gradients of some parameters.

    Returns:
        The mean loss over local steps, in nats; nan when there was no step.
    """
    params = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    received = {name: params[name].detach().clone() for name in params if shared is None or name in shared}
    losses = []
    for _ in range(method.local_epochs if params else 0):
        order = torch.randperm(len(y), generator=rng).to(y.device)
        for rows in order.split(method.batch):
            if len(rows) < method.min_batch:
                continue
            loss = method.loss(module, x[rows], y[rows]) + term(params, received)
            grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
            added = correction or {}
            grads = {n: g + added[n] if n in added else g for n, g in zip(params, grads, strict=True)}
            optimizer.step({name: grad.unsqueeze(0) for name, grad in grads.items()})
            losses.append(loss.detach())
    return torch.stack(losses).mean().item() if losses else float("nan")


class Trainer:
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

    def train(
        self,
        task: Task,
        round: int,
        sent: dict[int, np.ndarray],
        told: np.ndarray,
        payload: tuple[int, int],
        chunk: tuple[int, Written],
    ) -> Partial:
        """One round of a chunk of clients.

        Args:
            sent: (P,) all parameters, private ones as in round 0, as the server had them, by rounds done.
            told: what the server rule sends beside them.
            payload: bytes that a client is sent and sends.
            chunk: which of the parameters the clients got, and who they are.
        """
        version, clients = chunk
        like = self.module(task)[1]
        received = _to(self.device, unflatten(sent[version], like))
        shared = task.of(received, "shared")
        told = _to(self.device, unflatten(told, task.server.sends({}, task.of(like, "shared"))), task.dtype)
        rows_of = {client: self.clients[client].train for client, _ in clients}
        sums = _Sums(shared, self.device, task.server.sees_each)
        keeps = task.keeps(like)
        notes = []
        for fits in self._fits(task, round, received, told, clients, rows_of):
            weights, messages = [], []
            for place, client in enumerate(fits.clients):
                rows = len(rows_of[client])
                steps = task.method.steps(rows) * bool(fits.params)
                weight = task.server.weight(rows, round - 1 - version, steps)
                ours = {name: fits.params[name][place] for name in shared}
                rule, message = task.server.settle(fits.rule[place], told, shared, ours, steps, task.method.lr)
                if keeps:
                    self._keep(task, round, client, fits, place, rule)
                weights.append(weight)
                messages.append(message)
                notes.append((client, rows, steps, fits.losses[place], payload[1], payload[0]))
            sums.add(fits.clients, {name: fits.params[name] for name in shared}, messages, weights)
        return sums.partial(np.sort(np.array(notes, NOTE), order="client"))

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
        others = [self.clients[k] for k in also]
        for k, written in chunk:
            client = self.clients[k]
            own = [("val", client.val, client), (client.split, client.test, client)]
            parts = own + [(one.split, one.test, one) for one in others]
            entries += [((k, split, rows), self._space(whose)) for split, rows, whose in parts if split in splits]
            if task.of(like, "private"):
                module.load_state_dict(received | self._kept(task, k, written)[0])
                answers += self._judge(module, task, entries[len(answers) :])
        answers += self._judge(module, task, entries[len(answers) :])  # by the shared model, all at once
        guesses, owns, confidence = (
            np.concatenate([np.empty(0, np.int64), *some]) for some in zip(*answers, strict=True)
        )
        return tally([entry for entry, _ in entries], guesses, owns, confidence, self.features, held_out)

    def _space(self, client: Client) -> Space:
        own = self.clients.classes_of(client, self.features)
        everyone = own if client.split == "new" else self.trained_classes
        return torch.from_numpy(everyone), torch.from_numpy(own)

    @torch.no_grad()
    def _judge(self, module: nn.Module, task: Task, entries: list[Entry]) -> list[Answers]:
        """Of each entry the guesses in the protocol's label space and in the client's own; how sure of the former."""
        if not entries:
            return []
        sizes = [len(rows) for (_, _, rows), _ in entries]
        masks = [torch.stack(some).to(self.device) for some in zip(*(spaces for _, spaces in entries), strict=True)]
        if not _reads_classes(module):
            module.classes.fill_(True)
            rows = np.concatenate([rows for (_, _, rows), _ in entries])
            found = self._guess(module, task, rows, np.repeat(np.arange(len(sizes)), sizes), masks)
            return list(zip(*(np.split(some, np.cumsum(sizes)[:-1]) for some in found), strict=True))
        # What it says of one class follows from the others in question, so each entry is asked twice.
        answers = []
        for k, ((_, _, rows), _) in enumerate(entries):
            at, asked = np.full(len(rows), k), []
            for mask in masks if not torch.equal(masks[0][k], masks[1][k]) else masks[:1]:
                module.classes.copy_(mask[k])
                asked.append(self._guess(module, task, rows, at, [mask, mask]))
            answers.append((asked[0][0], asked[-1][0], asked[0][2]))
        return answers

    def _guess(
        self, module: nn.Module, task: Task, rows: np.ndarray, entry: np.ndarray, masks: list[Tensor]
    ) -> Answers:
        """Guesses within each of two label spaces, those of the rows' entries, and how sure of the former."""
        size, found = BLOCK[task.method.reads.image], []
        for first in range(0, max(1, len(rows)), size):  # one block of logits at a time
            logits = module(self._inputs(task, rows[first : first + size]).whole())
            at = torch.from_numpy(entry[first : first + size]).to(self.device)
            everyone, own = (logits.masked_fill(~mask[at], -torch.inf) for mask in masks)
            some = everyone.argmax(dim=1), own.argmax(dim=1), everyone.softmax(dim=1).amax(dim=1).float()
            found.append([answers.cpu().numpy() for answers in some])
        return tuple(np.concatenate(some) for some in zip(*found, strict=True))

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
            for name, tensor in task.server.start(shared, seed_for(task.seed, "start", round, client)).items():
                params[name][place] = tensor
                alike.pop(name, None)
            for name, tensor in own.items():
                params[name][place] = tensor
            if moments:
                optimizer.load(place, moments)
            rule.append(kept or task.server.keeps(shared))
        ids = [client for client, _ in clients]
        rows = np.concatenate([rows_of[client] for client in ids])
        x = self._inputs(task, rows, self._views(task, round, ids, rows_of))
        if x.level == "features":  # few bytes, asked for again and again; images may not fit into memory
            x = x.whole()
        y = torch.from_numpy(self.features.y[rows]).to(self.device)
        rngs = [torch_rng(task.seed, "batches", round, client) for client in ids]
        corrections = [task.server.correction(kept, told) for kept in rule]
        correction = {name: torch.stack([one[name] for one in corrections]) for name in corrections[0]}
        classes = self._classes(task, ids)
        module.classes.fill_(True)  # evaluation leaves what it asked last
        if task.reference:
            if classes is not None:
                module.classes.copy_(classes[0])
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_for(task.seed, "noise", round, ids[0]))  # of a module with dropout, say
                correction = {name: tensor[0] for name, tensor in correction.items()}
                how = {"shared": list(alike), "correction": correction}
                losses = [train_client(module, optimizer, x, y, task.method, task.server.local_term, rngs[0], **how)]
        else:
            sizes = [len(rows_of[client]) for client in ids]
            # A rule that adds nothing costs no second pass of autograd.
            term = None if type(task.server).local_term is Server.local_term else task.server.local_term
            how = {"correction": correction, "classes": classes}
            losses = train_stack(module, params, optimizer, alike, x, y, sizes, task.method, term, rngs, **how).tolist()
        kept = range(len(ids)) if task.method.keep_moments else ()
        return Fits(ids, params, losses, [optimizer.moments(place) for place in kept], rule)

    def _classes(self, task: Task, clients: list[int]) -> Tensor | None:
        """(M, C) bool, the classes that compete in each client's loss; None where all do."""
        if not self._masked(task):
            return None
        own = task.method.label_space == "client"
        masks = np.tile(self.trained_classes, (len(clients), 1))
        for mask, k in zip(masks, clients if own else (), strict=False):
            mask[:] = False
            mask[self.features.y[self.clients[k].train]] = True  # what only its test rows show is not for training
        return torch.from_numpy(masks).to(self.device)

    def _masked(self, task: Task) -> bool:
        return task.method.label_space == "client" or not self.trained_classes.all()

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
        if task.method.keep_moments:
            kept |= {MOMENTS + name: tensor for name, tensor in fits.moments[place].items()}
        if not all(tensor.isfinite().all() for tensor in kept.values()):
            raise InputError(f"training diverged: in round {round} client {client} is not finite; try a smaller lr")
        if kept or task.method.keep_moments:
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
        if not _reads_classes(module):
            everything = torch.ones(len(self.features.classes), dtype=torch.bool, device=self.device)
            module.register_buffer("classes", everything, persistent=False)
            module.asks_all = True
        else:  # where two modules share it, a move to another device has parted them
            module.register_buffer("classes", module.classes, persistent=False)
        if self._masked(task):
            module.register_forward_hook(_masked_out)
        return module, like

    def _clip(self, dtype: str) -> Clip:
        clip = self.frozen.open(self.device)
        clip.model.to(getattr(torch, dtype))
        return clip


class _Sums:
    """What becomes of a chunk's clients, as they come."""

    def __init__(self, shared: Params, device: str, each: bool) -> None:
        self.together = device != "cpu"  # one product for each tensor, where a kernel for each client would take longer
        size = sum(tensor.numel() for tensor in shared.values())
        self.shared, self.weight, self.message = shared, 0.0, np.zeros(0)
        self.delta = torch.zeros(0 if each else size, dtype=torch.float64, device=device)
        self.total = {} if each else views(self.delta, shared)
        # Adding float32 to float64 as it comes makes a new tensor for every client.
        room = torch.empty(max(map(torch.numel, shared.values()), default=0), dtype=torch.float64, device=device)
        self.doubled = {name: room[: tensor.numel()].view_as(tensor) for name, tensor in shared.items()}
        self.each: dict[int, np.ndarray] | None = {} if each else None

    def add(self, clients: list[int], ours: Params, messages: list[Params], weights: list[float]) -> None:
        """Adds a stack of M clients.

        Args:
            ours: (M, *shape) each, their shared tensors after training.
        """
        if self.together:
            scale = torch.tensor(weights, dtype=torch.float64, device=self.delta.device)
            for name, total in self.total.items():
                total.view(-1).add_(scale @ ours[name].reshape(len(weights), -1).double())
        for place, (client, message, weight) in enumerate(zip(clients, messages, weights, strict=True)):
            mine = {name: tensor[place] for name, tensor in ours.items()}
            self.weight += weight
            for name, total in self.total.items() if not self.together else ():
                total.add_(self.doubled[name].copy_(mine[name]), alpha=weight)
            if self.each is not None:
                self.each[client] = flatten({name: mine[name] - tensor for name, tensor in self.shared.items()})
            if message:
                said = weight * flatten(message).astype(np.float64)
                self.message = self.message + said if len(self.message) else said

    def partial(self, notes: np.ndarray) -> Partial:
        for name, total in self.total.items():
            total.sub_(self.shared[name], alpha=self.weight)  # in float64 it does no harm to subtract last
        each = None
        if self.each is not None:
            each = np.stack([self.each[client] for client in notes["client"].tolist()])
            if not np.isfinite(each).all():
                raise InputError("training diverged: an update is not finite; try a smaller --method.lr")
        return Partial(self.delta.cpu().numpy(), self.weight, notes, self.message, each)


def _reads_classes(module: nn.Module) -> bool:
    """Whether the module itself asks which classes are in question."""
    return hasattr(module, "classes") and not hasattr(module, "asks_all")


def _masked_out(module: nn.Module, args: tuple, logits: Tensor) -> Tensor:
    return logits.masked_fill(~module.classes, -torch.inf)


def _to(device: str, params: Params, dtype: str | None = None) -> Params:
    return {name: tensor.to(device, getattr(torch, dtype) if dtype else None) for name, tensor in params.items()}
