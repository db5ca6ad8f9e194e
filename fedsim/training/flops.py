"""What training costs: floating-point operations, counted where torch does them and not by a formula per method."""

from math import prod
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.datasets import Features
from fedsim.methods import Backbone, Batch, trained
from fedsim.training.inputs import Inputs
from fedsim.training.task import Task


def flops_of(task: Task, backbone: Backbone, features: Features, rows: np.ndarray) -> tuple[float, float]:
    """Operations of one local step: those of any step, and those of each row of its batch on top.

    Forward and backward passes of `Method.loss` by autograd: matrix products, convolutions and attention, two
    operations to a multiply-add. Neither the optimizer nor what is computed once and kept. Where a loss wants the texts
    of its batch's own classes alone, this is about as much as these rows want.

    Args:
        rows: some of those that are trained on, in no order; a batch if there are as many.
    """
    module = task.build(backbone)
    if not trained(module):
        return 0.0, 0.0

    def count(size: int) -> int:
        some = np.resize(rows, size)
        x = Inputs(features, task.method.reads.image, some, None, "cpu", backbone.prototypes.dtype).whole()
        y = torch.from_numpy(features.y[some])
        with Operations() as operations:
            task.method.loss(module.train(), Batch(x, y)).backward()
        return operations.total

    # Two at least, since some methods skip a batch of one; of images few, since each takes a tower's time.
    few = 2 if task.method.reads.image == "pixels" else max(2, task.method.batch_size // 2)
    half, whole = count(few), count(2 * few)
    return float(half - (whole - half)), (whole - half) / few


class Operations(TorchDispatchMode):
    """Counts floating-point operations while it is entered: two to a multiply-add.

    torch's own counter takes a second and 150 MB to be loaded, and of a depthwise convolution's gradient by its weight
    finds as many times too much as there are channels. Otherwise the two agree, which a test sees to.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; to skip it, torch would load its compiler: a second, and 150 MB

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.total += _operations(function.overloadpacket.__name__, args, out)
        return out


def _operations(name: str, args: tuple, out: Any) -> int:
    if name in ("mm", "bmm"):
        return 2 * out.numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2 * out.numel() * args[1].shape[-1]
    if name == "convolution":
        return 2 * prod((args[0] if args[6] else out).shape) * prod(args[1].shape[1:])
    if name == "convolution_backward":
        grad, x, weight, *_ = args
        # As much as the forward pass for each of the gradients by input and by weight that is wanted.
        return 2 * prod((x if args[7] else grad).shape) * prod(weight.shape[1:]) * sum(args[10][:2])
    if name.startswith("_scaled_dot_product"):
        backward = name.endswith("backward")
        query, key, value = args[1:4] if backward else args[:3]
        # Backward, the scores are computed again: three products as wide as a query, two as wide as a value.
        wide = 3 * query.shape[-1] + 2 * value.shape[-1] if backward else query.shape[-1] + value.shape[-1]
        return 2 * prod(query.shape[:-1]) * key.shape[-2] * wide
    return 0
