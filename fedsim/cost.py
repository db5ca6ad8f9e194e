"""What training costs: floating-point operations, counted by torch where they are done and not by a formula of ours."""

from math import prod

import numpy as np
import torch

from fedsim.datasets import Features
from fedsim.local import Task
from fedsim.methods import Backbone


def flops_of(task: Task, backbone: Backbone, features: Features, rows: np.ndarray) -> tuple[float, float]:
    """Operations of one local step: those of any step, and those of each row of its batch on top.

    Forward and backward passes of `Method.loss` by autograd; matrix products, convolutions and attention, two
    operations to a multiply-add, as torch counts them. Neither the optimizer nor what is computed once and kept. Where
    a loss wants the texts of its batch's own classes alone, this is about as much as these rows want.

    Args:
        rows: some of those that are trained on, in no order; a batch if there are as many.
    """
    from torch.utils.flop_counter import FlopCounterMode

    module = task.build(backbone)
    for name, tensor in module.named_parameters():
        tensor.requires_grad_(task.scope(name) in ("shared", "private"))
    if not any(tensor.requires_grad for tensor in module.parameters()):
        return 0.0, 0.0
    if not hasattr(module, "classes"):
        module.register_buffer("classes", torch.ones(len(backbone.prototypes), dtype=torch.bool), persistent=False)

    def count(size: int) -> int:
        some = np.resize(rows, size)
        x, y = torch.from_numpy(features.take(task.method.reads.image, some)), torch.from_numpy(features.y[some])
        x = x if x.dtype == torch.uint8 else x.to(backbone.prototypes.dtype)
        corrected = {torch.ops.aten.convolution_backward: _convolution_backward}
        with FlopCounterMode(display=False, custom_mapping=corrected) as counter:
            task.method.loss(module.train(), x, y).backward()
        return counter.get_total_flops()

    # Two at least, since some methods skip a batch of one; of images few, since each takes a tower's time.
    few = 2 if task.method.reads.image == "pixels" else max(2, task.method.batch // 2)
    half, whole = count(few), count(2 * few)
    return float(half - (whole - half)), (whole - half) / few


def _convolution_backward(
    grad, x, weight, bias, stride, padding, dilation, transposed, more, groups, wanted, **_
) -> int:
    """Of the shapes: as much as the forward pass for each of the gradients by input and by weight that is wanted.

    torch's own count forgets the groups of a convolution by its weight: of a depthwise one it finds as many times too
    much as there are channels.
    """
    return 2 * prod(x if transposed else grad) * prod(weight[1:]) * sum(wanted[:2])
