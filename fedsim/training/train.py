"""The readable path: the local training of one client."""

import torch
from torch import nn

from fedsim.methods import Method, RuleContext
from fedsim.params import Params, kept
from fedsim.servers import Server
from fedsim.training.estimates import estimated
from fedsim.training.optimizer import Optimizer
from fedsim.training.private_steps import PrivateSteps
from fedsim.training.rows import RuleInputs, TrainRows


def train_client(
    module: nn.Module,
    optimizer: Optimizer,
    rows: TrainRows,
    method: Method,
    server: Server,
    inputs: RuleInputs,
    rng: torch.Generator,
    private: PrivateSteps | None = None,
) -> float:
    """Trains the module in place on the rows of one client. `stack.train_stack` must give the same results.

    Args:
        optimizer: over the module's shared and private parameters, also those that are not trained in this round.
        rows, inputs: of this client alone.
        server: the rule, for what it adds to the gradients.
        rng: draws the order of the rows in every epoch, and the directions of estimates.
        private: how gradients are clipped and noised, if single rows are protected.

    Returns:
        The mean loss over local steps, in nats; nan if there was no step.
    """
    params: Params = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    names = {*inputs.shared, *inputs.unicast}
    received = {name: tensor.detach().clone() for name, tensor in params.items() if name in names}
    rule = RuleContext(received, inputs.states[0], inputs.sent)
    held = inputs.held[0] if inputs.held else {}
    losses = []
    for _ in range(method.local_epochs if params else 0):
        order = torch.randperm(len(rows.y), generator=rng).to(rows.y.device)
        for index in order.split(method.batch_size):
            if len(index) < method.min_batch:
                continue
            batch = rows.batch_of_one(index, rule=rule if method.reads_rule else None)
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
                grads = {name: grad.unsqueeze(0) for name, grad in kept(grads, held).items()}
                grads = method.clipped(grads)
            optimizer.step(grads)
            with torch.no_grad():
                for name, tensor in method.proximal(optimizer.params).items():
                    optimizer.params[name].copy_(tensor)
            losses.append(loss.detach())
    return torch.stack(losses).mean().item() if losses else float("nan")
