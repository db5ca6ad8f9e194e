"""What clients receive, and their losses with that, for server rules that read them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.methods import Batch, ClientContext, Method
from fedsim.methods._calls import with_tensors
from fedsim.params import Params
from fedsim.training.inputs import Inputs
from fedsim.training.targets import Targets


@dataclass(frozen=True)
class Received:
    """What the clients of a chunk were sent.

    Attributes:
        round: in which they were sent it.
        params: all parameters as the server had them.
        sent: what the rule sends besides.
        unicast: by client, what it alone has in place of some of `params`; the same names for all clients, or none.
    """

    round: int
    params: Params
    sent: Params
    unicast: dict[int, Params]


@torch.no_grad()
def received_losses(
    module: nn.Module,
    params: Params,
    x: Tensor | Inputs,
    y: Tensor,
    sizes: Sequence[int],
    method: Method,
    classes: Tensor | None = None,
    client: ClientContext | None = None,
    targets: Targets | None = None,
    group: Tensor | None = None,
) -> list[float]:
    """The mean of the method's loss over each client's train rows before it trains, in nats.

    It is computed client by client, on both engines, in evaluation mode and batches of `batch_size` rows, in their
    order; those with fewer than `min_batch` rows are left out.

    Args:
        params: (M, *shape) each, the clients' tensors.
        x, y, sizes, classes, client, targets, group: as in `train_stack`.

    Returns:
        M losses; nan for a client without a batch.
    """
    module.eval()
    losses, first = [], 0
    for k, size in enumerate(sizes):
        tensors = {name: tensor[k] for name, tensor in params.items()}
        own = None if classes is None else classes[k], client and client.part(k)
        total, count = 0.0, 0
        for rows in torch.arange(first, first + size, device=y.device).split(method.batch_size):
            if len(rows) < method.min_batch:
                continue
            target = targets and targets.take(len(rows), k, k + 1)[0]
            batch = Batch(x[rows], y[rows], *own, target, group=None if group is None else group[rows])
            loss = with_tensors(method.loss, module, tensors, batch)
            total, count = total + loss.item() * len(rows), count + len(rows)
        losses.append(total / count if count else float("nan"))
        first += size
    module.train()
    return losses
