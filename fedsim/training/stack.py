"""A stack of clients trained together: their parameters as one tensor each, their steps as one call each.

The fast path of every method. What it computes for a client is what `train_client` computes, to rounding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedsim.errors import InputError
from fedsim.methods import Batch, Method, trained
from fedsim.params import Params
from fedsim.servers import Server
from fedsim.training.optimizer import Optimizer

# What a stack's parameters, gradients and moments may take. On a CPU, what stays in cache: more clients at once
# are slower there (benchmarks/README.md). A function of the device alone, since the sums are rounded by it.
BUDGET_BYTES = {"cpu": 36 << 20, "cuda": 5 << 30}


def stack_size(params: Params, method: Method, device: str) -> int:
    """How many clients with these parameters are trained together."""
    if method.reads.towers:  # a step of one of them is large enough
        return 1
    held = 4 * sum(tensor.numel() * tensor.element_size() for tensor in params.values())
    return max(1, BUDGET_BYTES[torch.device(device).type] // max(1, held))


@torch.no_grad()
def train_stack(
    module: nn.Module,
    params: Params,
    optimizer: Optimizer,
    shared: Params,
    x: Tensor,
    y: Tensor,
    sizes: Sequence[int],
    method: Method,
    server: Server,
    rngs: Sequence[torch.Generator],
    states: Sequence[Params],
    sent: Params,
    classes: Tensor | None = None,
) -> Tensor:
    """Trains M clients in place, each on its own rows.

    Args:
        module: the method's, for its structure, and for what no client changes.
        params: each (M, *shape): every client's tensors, of which the parameters are trained.
        optimizer: over the trained tensors of `params`.
        shared: the tensors that all clients received alike, as they came: (*shape).
        x, y: (N, ...) inputs, or what gives them when it is indexed, and (N,) classes of all clients' train rows,
            client by client.
        sizes: rows of each client, descending.
        server: the rule, for what it adds to the gradients.
        rngs: draw the order of each client's rows, epoch by epoch.
        states: each client's memory for the server rule.
        sent: what the rule sends besides the parameters.
        classes: (M, C) bool, the classes that compete in each client's loss; None: all.

    Returns:
        (M,) mean loss over each client's local steps, in nats; nan where it took none.
    """
    starts = torch.tensor([0, *sizes]).cumsum(0)
    learned = trained(module)
    received = {name: tensor for name, tensor in shared.items() if name in learned}
    dtype = next((tensor.dtype for tensor in params.values()), torch.float32)
    # Asked of one client: a rule that adds nothing costs nothing at the steps.
    adds = server.gradient({name: params[name][0] for name in learned}, received, states[0], sent)
    memory = {name: torch.stack([state[name] for state in states]) for name in states[0]} if adds else {}
    losses = torch.zeros(len(sizes), dtype=dtype, device=y.device)
    steps = torch.zeros(len(sizes), dtype=torch.int64)
    for epoch in range(method.local_epochs if learned else 0):
        orders = [starts[k] + torch.randperm(size, generator=rngs[k]) for k, size in enumerate(sizes)]
        for taken, first, last in groups(sizes, method.batch_size, method.min_batch):
            rows = torch.stack([order[taken : taken + method.batch_size] for order in orders[first:last]]).to(y.device)
            batch = Batch(x[rows], y[rows], None if classes is None else classes[first:last])
            mine = {name: tensor[first:last] for name, tensor in params.items()}
            # Until the first step all clients have the same parameters, and one large product serves them all.
            at = mine | (received if epoch == 0 and taken == 0 else {})
            loss, grads = gradients(method, module, at, batch)
            if adds:
                state = {name: tensor[first:last] for name, tensor in memory.items()}
                extra = _added(server, {name: mine[name] for name in learned}, received, state, sent)
                grads = {name: grads[name] + extra[name] if name in extra else grads[name] for name in learned}
            optimizer.step({name: grads[name] for name in learned}, first, last)
            losses[first:last] += loss
            steps[first:last] += 1
    return (losses.cpu() / steps).where(steps > 0, torch.nan)


def groups(sizes: Sequence[int], batch: int, least: int) -> Iterator[tuple[int, int, int]]:
    """The steps of one epoch: rows taken before, and the first and last client whose batches have one size.

    Exact where a mask would not be: a loss over a batch is the method's own, and need not be a mean of rows.

    Args:
        sizes: rows of each client, descending.
        least: a last batch of fewer rows is skipped.
    """
    for taken in range(0, sizes[0], batch):
        lengths = [min(batch, size - taken) for size in sizes]
        first = 0
        while first < len(sizes) and lengths[first] >= max(1, least):
            last = first
            while last < len(sizes) and lengths[last] == lengths[first]:
                last += 1
            yield taken, first, last
            first = last


def gradients(method: Method, module: nn.Module, params: Params, batch: Batch) -> tuple[Tensor, Params]:
    """Losses of M clients and their gradients: the method's closed form, or its `loss` under autograd.

    Args:
        params: tensors of the module's state_dict, (M, *shape), or (*shape) where all clients have the same.
        batch: of M clients; every tensor has a leading M.

    Returns:
        (M,) losses in nats; and by name of each trained parameter, (M, *shape).
    """
    with _refused(method):
        closed = method.closed_form(module, params, batch)
        return by_autograd(method, module, params, batch) if closed is None else closed


def by_autograd(method: Method, module: nn.Module, params: Params, batch: Batch) -> tuple[Tensor, Params]:
    """What `gradients` computes where a method has no closed form."""
    objective = _Objective(method, module)
    learned = {name: params[name] for name in trained(module)}
    fixed = {name: tensor for name, tensor in params.items() if name not in learned}
    shapes = {name: tensor.dim() for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    stacked = [{n: 0 if v.dim() > shapes[n] else None for n, v in tensors.items()} for tensors in (learned, fixed)]

    def loss(learned: Params, fixed: Params, x: Tensor, y: Tensor, classes: Tensor | None) -> Tensor:
        tensors = {f"module.{name}": tensor for name, tensor in (learned | fixed).items()}
        return functional_call(objective, tensors, (Batch(x, y, classes),))

    if not method.reads.towers:
        in_dims = (*stacked, 0, 0, None if batch.classes is None else 0)
        grads, losses = vmap(grad_and_value(loss), in_dims=in_dims)(learned, fixed, *batch)
        return losses, grads
    # A step through a tower is large enough alone; and towers are not written for vmap.
    results = []
    for k in range(len(batch.x)):
        live = {n: (v if stacked[0][n] is None else v[k]).detach().requires_grad_() for n, v in learned.items()}
        rest = {n: v if stacked[1][n] is None else v[k] for n, v in fixed.items()}
        with torch.enable_grad():
            value = loss(live, rest, *(part if part is None else part[k] for part in batch))
        grads = torch.autograd.grad(value, list(live.values()), materialize_grads=True)
        results.append((value.detach(), *grads))
    losses, *grads = (
        torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0) for parts in zip(*results, strict=True)
    )
    return losses, dict(zip(learned, grads, strict=True))


class _Objective(nn.Module):
    """The loss as a module's forward, since `functional_call` swaps parameters for the length of one forward."""

    def __init__(self, method: Method, module: nn.Module) -> None:
        super().__init__()
        self.method, self.module = method, module

    def forward(self, batch: Batch) -> Tensor:
        return self.method.loss(self.module, batch)


def _added(server: Server, params: Params, received: Params, states: Params, sent: Params) -> Params:
    with _refused(server):
        return vmap(server.gradient, in_dims=(0, None, 0, None))(params, received, states, sent)


@contextmanager
def _refused(what: object) -> Iterator[None]:
    """Says in one sentence that something cannot be stacked; torch.func says it in many."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not any(word in str(error) for word in ("vmap", "functorch", "captured Tensor", "to return a Tensor")):
            raise
        reason = str(error).strip().splitlines()[0]
        name = getattr(what, "__qualname__", type(what).__name__)
        raise InputError(f"{name} cannot be stacked ({reason}); --engine reference trains client by client") from None
