"""The parameters of round 0, and what a model must be for the rest of the run to hold."""

from collections.abc import Sequence

import torch
from torch import nn

from fedsim.errors import InputError, listing
from fedsim.methods import Backbone, Batch, Method, trained
from fedsim.methods._batch_norm import BatchNorm
from fedsim.params import Params
from fedsim.privacy import replies
from fedsim.registry import name_of
from fedsim.rng import torch_rng
from fedsim.training.task import Task


def initial_params(task: Task, backbone: Backbone, cohort: int = 1) -> Params:
    """The parameters of round 0; `cohort` is the number of clients in a round."""
    _check_groups(task.method, backbone.groups)
    module = task.build(backbone)
    dtype = getattr(torch, task.dtype)
    if integers := [name for name, tensor in module.state_dict().items() if not tensor.is_floating_point()]:
        counted = any(name.endswith("num_batches_tracked") for name in integers)
        hint = "; fedsim.methods._batch_norm.BatchNorm does not count batches" if counted else ""
        raise InputError(f"{name_of(task.method)} has tensors that cannot be averaged: {listing(integers)}{hint}")
    params = {name: tensor.detach().clone().to(dtype) for name, tensor in module.state_dict().items()}
    if names := [name for name in params if task.method.scope(name) == "server"]:
        raise InputError(
            f"{name_of(task.method)} gives {listing(names)} the scope server, which only a server rule can give, "
            "because it says how the server changes a tensor that clients do not train; use frozen"
        )
    if task.method.min_batch < 2 and any(isinstance(part, BatchNorm) for part in module.modules()):
        raise InputError(f"{name_of(task.method)} has a BatchNorm, and one row has no variance; it needs min_batch = 2")
    if task.method.changes_gradients and task.method.estimator == "spsa":
        raise InputError(
            f"the gradient by which {name_of(task.method)} trains is not that of the values of its loss, from which "
            "--method.estimator spsa would estimate it; take autograd"
        )
    if (task.method.expands or task.select(params, "surveyed")) and task.method.reads.image != "features":
        what = "expands clients' rows" if task.method.expands else "makes a survey"
        raise InputError(f"{name_of(task.method)} {what}, which needs image features, not {task.method.reads.image}")
    if task.select(params, "surveyed") and task.method.reads.towers:
        raise InputError(
            f"{name_of(task.method)} makes a survey, which needs text features, not text {task.method.reads.text}"
        )
    untrained = [name for name in task.select(params, "shared") if name not in trained(module)]
    if untrained and not task.server.averages:
        raise InputError(
            f"server {name_of(task.server)} does not average, as {_of_method(task, untrained)} need, "
            "which clients compute without training them; take a rule that does, such as fedavg or fedprox"
        )
    parts = any(getattr(device, limit) for device in task.fleet.devices for limit in task.server.heeds)
    if parts and task.select(params, "private"):
        raise InputError(
            f"with fleet.ranks or fleet.blocks clients have parts of the shared tensors, and the private ones of "
            f"{_name(task.method)} would stay whole; take a method without private tensors, such as lora"
        )
    if task.privacy.protects:
        _check_privacy(task, params, untrained)
        if task.privacy.protects == "rows":
            _check_rows(task, module, backbone)
    if untrained and not task.codec.lossless:
        raise InputError(
            f"codec {name_of(task.codec)} would change {_of_method(task, untrained)}, which clients compute without "
            "training them; take plain"
        )
    if not task.codec.lossless and task.server.start(task.select(params, "shared"), torch_rng(task.seed, "start")):
        raise InputError(
            f"server {name_of(task.server)} gives clients new tensors before they train, and codec "
            f"{name_of(task.codec)} would encode these as if they were learned; take plain, or another rule"
        )
    if task.codec.sums:
        _check_sums(task, params, cohort)
    if (rows := task.server.root_rows) and not task.method.steps(rows):
        raise InputError(
            f"server.root_rows must be {task.method.min_batch} or more with method {name_of(task.method)}, got {rows}: "
            "the server could not take a step"
        )
    task.server.check({n: tensor for n, tensor in params.items() if task.method.scope(n) == "shared"}, cohort)
    return params


def _check_groups(method: Method, groups: Sequence[str]) -> None:
    """Refuses data without groups."""
    if method.reads_group and len(groups) < 2:
        raise InputError(
            f"method {_name(method)} needs rows of two or more groups (a sensitive attribute), and the data set has "
            f"{f'only {groups[0]!r}' if groups else 'none'}; give --dataset.group COLUMN of data set huggingface, or "
            "--dataset.domain-groups true"
        )


def _check_sums(task: Task, params: Params, cohort: int) -> None:
    """Refuses what needs more than the sum of the updates, and a sum that does not fit."""
    codec, server = f"codec {name_of(task.codec)}", f"server {name_of(task.server)}"
    if task.server.needs_deltas or task.server.unicasts or task.server.buffer is not None:
        raise InputError(f"{server} needs the update of each client, and with {codec} only their sum is known")
    answers = replies(task.method, task.server, task.select(params, "shared"))
    if any(each.message for each in answers):
        raise InputError(f"{server} has clients send messages besides their updates, which {codec} does not sum")
    if any(each.weight != 1 for each in answers):
        raise InputError(
            f"{server} weights the updates of clients, and {codec} sums them as they are; take equal weights"
        )
    if task.attack.colludes:
        raise InputError(f"attack {name_of(task.attack)} needs the update of each client, and {codec} sums them")
    if task.privacy.protects == "clients" and not task.privacy.protects_updates:
        raise InputError(
            f"privacy {name_of(task.privacy)} clips what the server decodes, and {codec} gives it the sum alone"
        )
    task.codec.check(cohort)


def _check_privacy(task: Task, params: Params, untrained: list[str]) -> None:
    """Refuses what clients would send besides tensors that they train, and what the mechanism refuses."""
    privacy, method = f"privacy {name_of(task.privacy)}", name_of(task.method)
    if task.select(params, "surveyed"):
        raise InputError(f"{privacy} does not cover the survey of {method}, whose sums over clients' rows are exact")
    if untrained:
        raise InputError(
            f"{privacy} would add noise to {_of_method(task, untrained)}, which clients compute without training them; "
            "take another method or server rule"
        )
    task.privacy.check(task.method, task.server, task.select(params, "shared"))


def _check_rows(task: Task, module: nn.Module, backbone: Backbone) -> None:
    """Refuses a method that reads features and whose loss of a batch is not the mean of its rows' losses.

    It is tried on three random rows. Of other methods, only what they declare is known; see `ExampleDP.check`.
    """
    if task.method.reads.image != "features" or task.method.reads_rule:
        return
    x = torch.randn(3, backbone.width, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 0]).clamp_max(len(backbone.class_embeddings) - 1)
    with torch.no_grad():
        module.eval()  # without dropout
        whole = task.method.loss(module, Batch(x, y))
        rows = torch.stack([task.method.loss(module, Batch(x[k : k + 1], y[k : k + 1])) for k in range(3)])
        module.train()
    if not torch.allclose(whole, rows.mean(), rtol=1e-3):
        raise InputError(
            f"privacy {name_of(task.privacy)} clips the gradients of single rows, but the loss of method "
            f"{name_of(task.method)} is not the mean of its rows' losses; take another method or objective"
        )


def _of_method(task: Task, names: list[str]) -> str:
    """Tensors of a method, in words that its user knows."""
    return f"{listing(name.removeprefix('shared.') for name in names)} of {_name(task.method)}"


def _name(method: Method) -> str:
    """The name of a method, also as a server rule adapts it."""
    while isinstance(inner := getattr(method, "inner", None), Method):
        method = inner
    return name_of(method)
