"""The fast path: the clients of a stack are trained together, with one tensor per parameter and one call per step.

For each client it computes what `train_client` computes, up to rounding.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from fedsim.clip.sites import stackable
from fedsim.methods import Batch, Method, RuleContext, trained
from fedsim.methods._calls import with_tensors
from fedsim.params import Params, kept
from fedsim.servers import Server
from fedsim.training.dimensions import batch_of_client, dims_of, dims_of_batch, of_client, one_sentence
from fedsim.training.estimates import by_differences
from fedsim.training.optimizer import Optimizer
from fedsim.training.private_steps import PrivateSteps
from fedsim.training.rows import RuleInputs, TrainRows

# What a stack's parameters, gradients and moments may take. On a CPU this is what stays in cache; larger stacks are
# slower (benchmarks/README.md). It depends on the device alone, because the order of a sum's rounding depends on it.
BUDGET_BYTES = {"cpu": 36 << 20, "cuda": 5 << 30}
# What the text tower may keep for the backward pass of a stack: of a ViT-B and 100 classes, that of 36 clients. Methods
# with two prompts take twice as much, and two actors share a GPU by default. On a CPU the step of a single client is
# large enough; on a GPU it mostly waits for small kernels.
TOWER_BYTES = {"cpu": 0, "cuda": 6 << 30}


def stack_size(params: Params, method: Method, device: str, tower_bytes: int = 0, rows: int = 0) -> int:
    """The number of clients that are trained together.

    Args:
        params: the tensors of a client.
        tower_bytes: what the text tower keeps for the backward pass of a client's step; 0 if it has no part in it.
        rows: of a batch, if each has gradients of its own.
    """
    if not stackable(method.sites):
        return 1
    kind = torch.device(device).type
    client_bytes = (4 + rows) * sum(tensor.numel() * tensor.element_size() for tensor in params.values())
    size = BUDGET_BYTES[kind] // max(1, client_bytes)
    return max(1, min(size, TOWER_BYTES[kind] // tower_bytes) if tower_bytes else size)


@torch.no_grad()
def train_stack(
    module: nn.Module,
    params: Params,
    optimizer: Optimizer,
    rows: TrainRows,
    method: Method,
    server: Server,
    inputs: RuleInputs,
    rngs: Sequence[torch.Generator],
    private: PrivateSteps | None = None,
) -> Tensor:
    """Trains M clients in place, each on its own rows.

    Args:
        module: the method's module, for its structure and for the tensors that clients do not change.
        params: (M, *shape) each, the clients' tensors; the trained ones change in place.
        optimizer: over the parameters among `params`, also those that are not trained in this round.
        server: the rule, for what it adds to the gradients.
        rngs: for each client, draws the order of its rows in every epoch, and the directions of estimates.
        private: how gradients are clipped and noised, if single rows are protected.

    Returns:
        (M,) mean loss over each client's local steps, in nats; nan where it took none.
    """
    sizes, learned = rows.sizes, trained(module)
    starts = torch.tensor([0, *sizes]).cumsum(0)
    received = {name: tensor for name, tensor in inputs.shared.items() if name in learned}
    own = {name: tensor for name, tensor in inputs.unicast.items() if name in learned}
    dtype = next((tensor.dtype for tensor in params.values()), torch.float32)
    # Probed with one client: a rule that adds nothing costs nothing per step.
    alone = received | {name: tensor[0] for name, tensor in own.items()}
    adds = server.gradient({name: params[name][0] for name in learned}, alone, inputs.states[0], inputs.sent)
    names = inputs.states[0] if adds or method.reads_rule else ()
    memory = {name: torch.stack([state[name] for state in inputs.states]) for name in names}
    held = inputs.stacked_held(params)
    losses = torch.zeros(len(sizes), dtype=dtype, device=rows.y.device)
    steps = torch.zeros(len(sizes), dtype=torch.int64)
    for epoch in range(method.local_epochs if learned else 0):
        orders = [starts[k] + torch.randperm(size, generator=rngs[k]) for k, size in enumerate(sizes)]
        for offset, first, last in groups(sizes, method.batch_size, method.min_batch):
            part, each, states, masks = (_part(tensors, first, last) for tensors in (params, own, memory, held))
            rule = RuleContext(received | each, states, inputs.sent)
            index = torch.stack([order[offset : offset + method.batch_size] for order in orders[first:last]])
            batch = rows.batch(index.to(rows.y.device), first, last, rule if method.reads_rule else None)
            # Before the first step all clients have the same parameters, and one large product serves them all.
            start = part | received if epoch == 0 and offset == 0 else part
            if private:
                loss, grads = private.gradients(method, module, start, batch, first)
            else:
                loss, grads = gradients(method, module, start, batch, rngs[first:last])
            if adds:
                extra = _added(server, {name: part[name] for name in learned}, rule, each)
                grads |= {name: grads[name] + extra[name] for name in learned if name in extra}
            grads = kept({name: grads[name] for name in learned}, masks)
            optimizer.step(method.clipped(grads), first, last)
            for name, tensor in method.proximal({name: part[name] for name in optimizer.params}).items():
                part[name].copy_(tensor)
            losses[first:last] += loss
            steps[first:last] += 1
    return (losses.cpu() / steps).where(steps > 0, torch.nan)


def _part(tensors: Params, first: int, last: int) -> Params:
    """The clients from `first` to before `last`, as views."""
    return {name: tensor[first:last] for name, tensor in tensors.items()}


def groups(sizes: Sequence[int], batch: int, min_batch: int) -> Iterator[tuple[int, int, int]]:
    """The steps of one epoch: the offset of the batch, and the first client and the last (exclusive) of a group whose
    batches have one size.

    Padding and masking would not be exact: a loss over a batch need not be a mean over rows.

    Args:
        sizes: train rows of each client, descending.
        min_batch: a last batch with fewer rows is skipped.
    """
    for offset in range(0, sizes[0], batch):
        lengths = [min(batch, size - offset) for size in sizes]
        first = 0
        while first < len(sizes) and lengths[first] >= max(1, min_batch):
            last = first
            while last < len(sizes) and lengths[last] == lengths[first]:
                last += 1
            yield offset, first, last
            first = last


def gradients(
    method: Method, module: nn.Module, params: Params, batch: Batch, rngs: Sequence[torch.Generator] = ()
) -> tuple[Tensor, Params]:
    """Losses of M clients and their gradients: the method's closed form, its `loss` under autograd, or an estimate.

    Args:
        params: tensors of the module's state_dict, (M, *shape), or (*shape) if all clients have the same.
        batch: that of M clients; every tensor has a leading M.
        rngs: of each client, for an estimate.

    Returns:
        (M,) losses in nats; and the gradient of each trained parameter, (M, *shape), by its name.
    """
    with one_sentence(method):
        if method.estimator == "spsa":
            like: Params = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
            learned = {name: params[name] for name in like}
            return by_differences(partial(_losses, method, module, params, batch), learned, like, method, rngs)
        closed = method.closed_form(module, params, batch)
        return by_autograd(method, module, params, batch) if closed is None else closed


def by_autograd(method: Method, module: nn.Module, params: Params, batch: Batch) -> tuple[Tensor, Params]:
    """What `gradients` computes if a method has no closed form."""
    learned = {name: params[name] for name in trained(module)}
    fixed = {name: tensor for name, tensor in params.items() if name not in learned}
    stacked = dims_of(module, learned), dims_of(module, fixed)
    each = dims_of_batch(module, batch)

    def loss(learned: Params, fixed: Params, batch: Batch) -> Tensor:
        return with_tensors(method.loss, module, learned | fixed, batch)

    if not method.reads.towers:
        grads, losses = vmap(grad_and_value(loss), in_dims=(*stacked, each))(learned, fixed, batch)
        return losses, grads
    if _in_one_call(method, batch):
        # The text tower takes the texts of all clients in one call, and autograd is outside vmap, as `over_clients`
        # needs. A loss depends on the tensors of its client only.
        own = {n: v.expand(len(batch.x), *v.shape) if stacked[0][n] is None else v for n, v in learned.items()}
        live = {n: v.detach().requires_grad_() for n, v in own.items()}
        with torch.enable_grad():
            losses = vmap(loss, in_dims=(0, stacked[1], each))(live, fixed, batch)
        grads = torch.autograd.grad(losses, list(live.values()), torch.ones_like(losses), materialize_grads=True)
        return losses.detach(), dict(zip(live, grads, strict=True))
    # One client at a time: the weights of a tower, or what is inserted into it, differ between clients.
    results: list[list[Tensor]] = []
    for k in range(len(batch.x)):
        live = {n: v.detach().requires_grad_() for n, v in of_client(learned, k, stacked[0]).items()}
        rest = of_client(fixed, k, stacked[1])
        with torch.enable_grad():
            value = loss(live, rest, batch_of_client(batch, k, each.rule))
        grads = torch.autograd.grad(value, list(live.values()), materialize_grads=True)
        results.append([value.detach(), *grads])
    losses, *grads = [_stacked(list(tensors)) for tensors in zip(*results, strict=True)]
    return losses, dict(zip(learned, grads, strict=True))


def _losses(method: Method, module: nn.Module, params: Params, batch: Batch, moved: Params) -> Tensor:
    """(M,) losses, without gradients, with the tensors `moved` in place of those in `params`; else as `gradients`."""
    params = params | moved
    dims, each = dims_of(module, params), dims_of_batch(module, batch)

    def loss(params: Params, batch: Batch) -> Tensor:
        return with_tensors(method.loss, module, params, batch)

    if not method.reads.towers or _in_one_call(method, batch):
        return vmap(loss, in_dims=(dims, each))(params, batch)
    clients = range(len(batch.x))
    return _stacked([loss(of_client(params, k, dims), batch_of_client(batch, k, each.rule)) for k in clients])


def _in_one_call(method: Method, batch: Batch) -> bool:
    """Whether the text tower takes the texts of all clients in one call."""
    return len(batch.x) > 1 and stackable(method.sites) and _equally_many(batch.classes)


def _equally_many(classes: Tensor | None) -> bool:
    """Whether all clients have as many active classes, since the dimensions of a stack are the same for all."""
    return classes is None or len(classes.sum(dim=1).unique()) == 1


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]  # one client's without a copy


def _added(server: Server, params: Params, rule: RuleContext, own: Collection[str]) -> Params:
    """What the rule adds to the gradients of M clients; `own` names what each received for itself."""
    dims = {name: 0 if name in own else None for name in rule.received}
    with one_sentence(server):
        return vmap(server.gradient, in_dims=(0, dims, 0, None))(params, *rule)
