"""The readable path: the local training of one client."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsim.methods import Batch, ClientContext, Method, RuleContext
from fedsim.params import Params
from fedsim.servers import Server
from fedsim.training.estimates import estimated
from fedsim.training.inputs import Inputs
from fedsim.training.optimizer import Optimizer
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
) -> float:
    """Trains the module in place on one client's rows. `stack.train_stack` must give the same results.

    Args:
        optimizer: over the module's trained parameters.
        x: (n, ...) inputs of the client's train rows.
        y: (n,) their classes.
        server: the rule, for what it adds to the gradients.
        rng: draws the order of the rows in every epoch, and the directions of estimates.
        shared: names of the tensors that the client received; None: all.
        client_state, sent: the client's memory for the rule, and what the rule sends besides the parameters.
        classes: (C,) bool, the classes that compete in the loss; None: all.
        client: the client, for methods that read it.
        targets: of this client alone, for methods that read rows of held-out domains.

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
            batch = Batch(x[rows], y[rows], classes, client, target, rule if method.reads_rule else None)
            if method.estimator == "spsa":
                loss, grads = estimated(method, module, params, batch, rng)
            else:
                loss = method.loss(module, batch)
                grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
            with torch.no_grad():
                extra = server.gradient(params, *rule)
                grads = {n: g + extra[n] if n in extra else g for n, g in zip(params, grads, strict=True)}
                grads = method.clipped({name: grad.unsqueeze(0) for name, grad in grads.items()})
            optimizer.step(grads)
            with torch.no_grad():
                for name, tensor in method.proximal({n: params[n].detach().unsqueeze(0) for n in params}).items():
                    params[name].copy_(tensor[0])
            losses.append(loss.detach())
    return torch.stack(losses).mean().item() if losses else float("nan")
