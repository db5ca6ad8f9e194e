"""The floating-point operations of training, counted as torch executes them, so that no method needs a formula."""

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.fleets import Device
from fedsim.methods import Backbone, Batch, ClientContext, RuleContext, trained
from fedsim.params import kept
from fedsim.representations import Encoded
from fedsim.training.inputs import Inputs
from fedsim.training.task import Task


def flops_of(
    task: Task,
    backbone: Backbone,
    data: Encoded,
    rows: np.ndarray,
    classes: np.ndarray | None = None,
    client: ClientContext | None = None,
    device: Device | None = None,
) -> tuple[float, float]:
    """The operations of a local step that do not depend on its batch, and the operations per row of the batch.

    They are those of the forward and backward pass of `Method.loss` under autograd, or of the forward passes of an
    estimate: matrix products, convolutions and attention, with two operations per multiply-add. The optimizer and
    representations that are computed once are not counted. If a loss encodes the texts of the classes in its batch
    only, the count holds for the given rows.

    Args:
        rows: train rows, in any order; a whole batch if there are as many.
        classes: (C,) bool, the classes that compete for them; None: all.
        client: whose rows they are, for methods that read it.
        device: the client's, which may have a part of the shared tensors.
    """
    module = task.build(backbone)
    if not trained(module):
        return 0.0, 0.0

    active = None if classes is None else torch.from_numpy(classes)
    shared = task.select({name: tensor.detach() for name, tensor in module.state_dict().items()}, "shared")
    if held := task.held(shared, device or Device()):
        module.load_state_dict(kept(shared, held), strict=False)
    slots, client_state = task.server.init(shared)
    received = {name: shared[name] for name in trained(module) if name in shared}
    rule = RuleContext(received, client_state, task.server.broadcast(slots, shared))

    exact = task.method.estimator == "autograd"

    def loss(size: int) -> Tensor:
        batch = np.resize(rows, size)
        x = Inputs(
            data.representations, task.method.reads.image, batch, None, "cpu", backbone.class_embeddings.dtype
        ).whole()
        y = torch.from_numpy(data.y[batch])
        target = x if task.method.reads_target else None
        given = rule if task.method.reads_rule else None
        group = torch.from_numpy(data.group[batch]) if task.method.reads_group and data.group is not None else None
        return task.method.loss(module.train(), Batch(x, y, active, client, target, given, group))

    def count(size: int) -> int:
        for name in () if exact else trained(module):  # as in training, where texts of earlier values are of no use
            module.get_parameter(name).data += task.method.perturbation
        with Operations() as operations, torch.set_grad_enabled(exact):
            value = loss(size)
            if exact:
                value.backward()
        return operations.total * (1 if exact else 2 * task.method.directions)

    if task.method.reads.text != "features":
        with torch.no_grad():
            loss(2)  # computes the texts that a module keeps because no parameter changes them
    # At least two rows, because some methods skip a batch of one; few images, because each passes through a tower.
    size = 2 if task.method.reads.image == "pixels" else max(2, task.method.batch_size // 2)
    half, whole = count(size), count(2 * size)
    return float(half - (whole - half)), (whole - half) / size


class Operations(TorchDispatchMode):
    """Counts floating-point operations inside a `with` block: two per multiply-add.

    torch.utils.flop_counter takes a second and 150 MB to load, and overstates the weight gradient of a depthwise
    convolution by a factor of the number of channels. Otherwise the two agree, as a test checks.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; True would make torch load its compiler: a second and 150 MB

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
        # The cost of a forward pass for each requested gradient, by input and by weight.
        return 2 * prod((x if args[7] else grad).shape) * prod(weight.shape[1:]) * sum(args[10][:2])
    if name.startswith("_scaled_dot_product"):
        backward = name.endswith("backward")
        query, key, value = args[1:4] if backward else args[:3]
        # The backward pass recomputes the scores: three products as wide as a query, two as wide as a value.
        width = 3 * query.shape[-1] + 2 * value.shape[-1] if backward else query.shape[-1] + value.shape[-1]
        return 2 * prod(query.shape[:-1]) * key.shape[-2] * width
    return 0
