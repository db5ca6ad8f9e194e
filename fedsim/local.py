"""One client's share of a round, and of a chunk of clients, one after the other: the readable reference path."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedsim.clients import Client
from fedsim.datasets import Features
from fedsim.evaluate import count
from fedsim.methods import Backbone, Method
from fedsim.params import Params, flatten, payload_bytes, unflatten
from fedsim.rng import seed_for, torch_rng
from fedsim.servers import Partial, Server, Trained


@dataclass(frozen=True)
class Task:
    """What is the same for all clients of a run. With a client, a round and parameters it says everything."""

    method: Method
    server: Server
    seed: int
    dtype: str = "float32"

    def is_shared(self, name: str) -> bool:
        return self.method.is_shared(name) and self.server.is_shared(name)


def start(task: Task, backbone: Backbone) -> Params:
    """The parameters of round 0: PyTorch's default initialisation under the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(task.seed, "init"))
        module = task.method.build(backbone)
    dtype = getattr(torch, task.dtype)
    return {name: tensor.detach().clone().to(dtype) for name, tensor in module.state_dict().items()}


def backbone_of(features: Features, device: str = "cpu", dtype: str = "float32") -> Backbone:
    prototypes = torch.tensor(features.prototypes, dtype=getattr(torch, dtype), device=device)
    return Backbone(prototypes, features.logit_scale)


def train_client(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    method: Method,
    local_term: Callable[[Params, Params], Tensor | float],
    rng: torch.Generator,
) -> float:
    """Trains the module in place on one client's rows.

    Args:
        x: (n, D) features of the client's train rows, in the dtype of the parameters.
        y: (n,) their classes.
        local_term: what the server rule adds to the loss.
        rng: draws the order of the rows, epoch by epoch.

    Returns:
        The mean loss over local steps, in nats; nan when there was no step.
    """
    params = dict(module.named_parameters())
    received = {name: tensor.detach().clone() for name, tensor in params.items()}
    update = _optimizer(method, list(params.values()))
    losses = []
    for _ in range(method.local_epochs if params else 0):
        order = torch.randperm(len(x), generator=rng).to(x.device)
        for rows in order.split(method.batch):
            if len(rows) < method.min_batch:
                continue
            loss = method.loss(module, x[rows], y[rows]) + local_term(params, received)
            # Contiguous: torch's fused optimizers on the CPU walk raw memory.
            update([grad.contiguous() for grad in torch.autograd.grad(loss, list(params.values()))])
            losses.append(loss.detach())
    return torch.stack(losses).mean().item() if losses else float("nan")


class Trainer:
    """Trains and evaluates chunks of clients. A chunk is pure: the same call gives the same bits anywhere."""

    def __init__(self, features: Features, clients: list[Client], device: str = "cpu") -> None:
        self.features = features
        self.clients = clients
        self.device = device

    def train(self, task: Task, round: int, sent: np.ndarray, chunk: list[tuple[int, np.ndarray | None]]) -> Partial:
        """One round of a chunk of clients.

        Args:
            sent: (P + Q,) all parameters as the server has them.
            chunk: ids of clients, each with its (Q,) private tensors; None where it has none yet.
        """
        total = None
        for client, private in chunk:
            partial = self._train_one(task, round, sent, client, private)
            total = partial if total is None else total + partial
        return total

    def evaluate(
        self, task: Task, sent: np.ndarray, also: list[int], chunk: list[tuple[int, np.ndarray | None]]
    ) -> np.ndarray:
        """Counts of a chunk of clients on their own validation and test rows.

        Args:
            also: ids of held-out clients on whose test rows every client of the chunk is judged as well.

        Returns:
            (n, 5) int64, columns as in `evaluate.COLUMNS`.
        """
        module, like = self._module(task.method, task.dtype)
        counts = []
        for client, private in chunk:
            module.load_state_dict(_merged(task, unflatten(sent, like), private))
            rows = [("val", self.clients[client].val)]
            rows += [("test", self.clients[k].test) for k in (client, *also)]
            counts += [count(module, self.features, client, split, r, self._xy(task, r)) for split, r in rows]
        return np.concatenate(counts)

    def _train_one(self, task, round, sent, client, private) -> Partial:
        module, like = self._module(task.method, task.dtype)
        received = _merged(task, unflatten(sent, like), private)
        module.load_state_dict(received)
        rows = self.clients[client].train
        x, y = self._xy(task, rows)
        rng = torch_rng(task.seed, "batches", round, client)
        loss = train_client(module.train(), x, y, task.method, task.server.local_term, rng)
        trained = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
        shared = {name: received[name] for name in received if task.is_shared(name)}
        own = {name: trained[name] for name in received if not task.is_shared(name)}
        weight = task.server.weight(len(rows))
        delta = flatten({name: trained[name].double() - shared[name].double() for name in shared})
        sizes = payload_bytes(shared)
        note = Trained(client, len(rows), loss, bytes_up=sizes, bytes_down=sizes)
        return Partial(weight * delta.astype(np.float64), weight, [note], {client: flatten(own)} if own else {})

    def _xy(self, task: Task, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(self.features.x[rows]).to(self.device, getattr(torch, task.dtype))
        return x, torch.from_numpy(self.features.y[rows]).to(self.device)

    @lru_cache(maxsize=4)  # noqa: B019 - one Trainer per process, which ends with it
    def _module(self, method: Method, dtype: str) -> tuple[nn.Module, Params]:
        module = method.build(backbone_of(self.features, self.device, dtype)).to(self.device, getattr(torch, dtype))
        return module, {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}


def _merged(task: Task, params: Params, private: np.ndarray | None) -> Params:
    if private is None:
        return params
    return params | unflatten(private, {name: v for name, v in params.items() if not task.is_shared(name)})


def _optimizer(method: Method, params: list[Tensor]) -> Callable[[list[Tensor]], None]:
    """One step of the method's optimizer, its state at zero.

    torch's functional form: making a torch.optim.Optimizer imports torch._dynamo, 4 CPU seconds per actor.
    """
    first = [torch.zeros_like(param) for param in params]
    second = [torch.zeros_like(param) for param in params]
    steps = [torch.zeros((), dtype=torch.float32, device=param.device) for param in params]
    momenta: list[Tensor | None] = [None] * len(params)

    @torch.no_grad()
    def update(grads: list[Tensor]) -> None:
        shared = {"lr": method.lr, "weight_decay": method.weight_decay, "maximize": False, "fused": True}
        if method.optimizer == "sgd":
            sgd(params, grads, momenta, momentum=method.momentum, dampening=0.0, nesterov=False, **shared)
            return
        rule = adam if method.optimizer == "adam" else adamw
        moments = {"beta1": method.beta1, "beta2": method.beta2, "eps": method.eps, "amsgrad": False}
        rule(params, grads, first, second, [], steps, **moments, **shared)

    return update
