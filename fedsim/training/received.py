"""What clients receive, and their losses with that, for server rules that read them."""

from dataclasses import dataclass

import torch
from torch import nn

from fedsim.methods import Method
from fedsim.methods._calls import with_tensors
from fedsim.params import Params
from fedsim.training.rows import TrainRows


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
def received_losses(module: nn.Module, params: Params, rows: TrainRows, method: Method) -> list[float]:
    """The mean of the method's loss over each client's train rows before it trains, in nats.

    It is computed client by client, on both engines, in evaluation mode and batches of `batch_size` rows, in their
    order; those with fewer than `min_batch` rows are left out.

    Args:
        params: (M, *shape) each, the clients' tensors.

    Returns:
        M losses; nan for a client without a batch.
    """
    module.eval()
    losses, first = [], 0
    for k, size in enumerate(rows.sizes):
        tensors = {name: tensor[k] for name, tensor in params.items()}
        total, count = 0.0, 0
        for index in torch.arange(first, first + size, device=rows.y.device).split(method.batch_size):
            if len(index) < method.min_batch:
                continue
            loss = with_tensors(method.loss, module, tensors, rows.batch_of_one(index, k))
            total, count = total + loss.item() * len(index), count + len(index)
        losses.append(total / count if count else float("nan"))
        first += size
    module.train()
    return losses
