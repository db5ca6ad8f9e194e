"""The rows on which clients train in place of those that they have, for methods that expand them."""

import torch
from torch import Tensor, nn

from fedsim.methods import Batch
from fedsim.registry import name_of
from fedsim.rng import torch_rng
from fedsim.training.task import Task


def expanded(
    task: Task, module: nn.Module, clients: list[int], batch: Batch, sizes: list[int]
) -> tuple[Tensor, Tensor, list[int]]:
    """The inputs, classes and numbers of rows on which the clients of a stack train, client by client.

    Args:
        batch: the rows that they have, `sizes` of each.
    """
    parts = []
    for k, (client, x, y) in enumerate(zip(clients, batch.x.split(sizes), batch.y.split(sizes), strict=True)):
        own = Batch(x, y, client=batch.client and batch.client.part(k))
        part = task.method.expand(module, own, torch_rng(task.seed, "expand", client))
        if len(part[1]) != (expected := task.method.local_rows(y.cpu().numpy())):
            raise TypeError(f"{name_of(task.method)}: expand gave {len(part[1])} rows, local_rows {expected}")
        parts.append(part)
    xs, ys = zip(*parts, strict=True)
    return torch.cat(xs), torch.cat(ys), [len(y) for y in ys]
