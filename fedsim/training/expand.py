"""The rows on which clients train in place of those that they have, for methods that expand them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedsim.methods import Batch
from fedsim.registry import name_of
from fedsim.rng import torch_rng
from fedsim.training.rows import TrainRows
from fedsim.training.task import Task


def expanded(task: Task, module: nn.Module, clients: Sequence[int], rows: TrainRows) -> TrainRows:
    """The rows on which the clients of a stack train, made of those that they have."""
    assert isinstance(rows.x, Tensor) and rows.group is None, "features, and groups of rows that are made are not known"
    xs, ys = rows.x.split(rows.sizes), rows.y.split(rows.sizes)
    parts = []
    for k, (client, x, y) in enumerate(zip(clients, xs, ys, strict=True)):
        own = Batch(x, y, client=rows.client and rows.client.part(k))
        part = task.method.expand(module, own, torch_rng(task.seed, "expand", client))
        if len(part[1]) != (expected := task.method.local_rows(y.cpu().numpy())):
            raise TypeError(f"{name_of(task.method)}: expand gave {len(part[1])} rows, local_rows {expected}")
        parts.append(part)
    xs, ys = zip(*parts, strict=True)
    return replace(rows, x=torch.cat(xs), y=torch.cat(ys), sizes=[len(y) for y in ys])
