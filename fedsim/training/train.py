"""The readable path: the local training of one client."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsim.methods import Batch, ClientContext, Method, RuleContext
from fedsim.params import Params, kept
from fedsim.servers import Server
from fedsim.training.estimates import estimated
from fedsim.training.inputs import Inputs
from fedsim.training.optimizer import Optimizer
from fedsim.training.private_steps import PrivateSteps
from fedsim.training.targets import Targets


def train_client(
    module: nn.Module,
    optimizer: Optimizer,
    x: Tensor | Inputs,
    y: Tensor,
    method: Method,
    server: Server,
    rng: torch.Generator,
    shared: Sequence[str] | None = None,
    client_state: Params | None = None,
    sent: Params | None = None,
    classes: Tensor | None = None,
    client: ClientContext | None = None,
    targets: Targets | None = None,
    private: PrivateSteps | None = None,
    group: Tensor | None = None,
    held: Params | None = None,
) -> float:
    """Trains the module in place on one client's rows. `stack.train_stack` must give the same results.

    Args:
        optimizer: over the module's shared and private parameters, also those that are not trained in this round.
        x: (n, ...) inputs of the client's train rows.
        y: (n,) their classes.
        server: the rule, for what it adds to the gradients.
        rng: draws the order of the rows in every epoch, and the directions of estimates.
        shared: names of the tensors that the client received; None: all.
        client_state, sent: the client's memory for the rule, and what the rule sends besides the parameters.
        classes: (C,) bool, the classes that compete in the loss; None: all.
        client: the client, for methods that read it.
        targets: of this client alone, for methods that read rows of held-out domains.
        private: how gradients are clipped and noised, if single rows are protected.
        group: (n,) the rows' groups, for methods that read them.
        held: which entries of the tensors the client has, where that is not all; the others have no gradient.

    Returns:
        The mean loss over local steps, in nats; nan if there was no step.
    """
    params: Params = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    received = {name: params[name].detach().clone() for name in params if shared is None or name in shared}
    rule = RuleContext(received, client_state or {}, sent or {})
    losses = []
    for _ in range(method.local_epochs if params else 0):
        order = torch.randperm(len(y), generator=rng).to(y.device)
        for rows in order.split(method.batch_size):
            if len(rows) < method.min_batch:
                continue
            target = targets and targets.take(len(rows))[0]
            given, own = rule if method.reads_rule else None, None if group is None else group[rows]
            batch = Batch(x[rows], y[rows], classes, client, target, given, own)
            if private:
                loss, grads = private.alone(method, module, params, batch)
            elif method.estimator == "spsa":
                loss, estimates = estimated(method, module, params, batch, rng)
                grads = dict(zip(params, estimates, strict=True))
            else:
                loss = method.loss(module, batch)
                each = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
                grads = dict(zip(params, each, strict=True))
            with torch.no_grad():
                extra = server.gradient(params, *rule)
                grads = {n: grad + extra[n] if n in extra else grad for n, grad in grads.items()}
                grads = {name: grad.unsqueeze(0) for name, grad in kept(grads, held or {}).items()}
                grads = method.clipped(grads)
            optimizer.step(grads)
            with torch.no_grad():
                for name, tensor in method.proximal(optimizer.params).items():
                    optimizer.params[name].copy_(tensor)
            losses.append(loss.detach())
    return torch.stack(losses).mean().item() if losses else float("nan")
