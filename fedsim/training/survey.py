"""The survey: what every client that trains contributes once, before round 1, and what the server makes of the sum."""

from collections.abc import Iterable, Sequence
from math import prod

import numpy as np
import torch

from fedsim.clients import Population
from fedsim.errors import InputError, listing
from fedsim.methods import Backbone, Batch, ClientContext
from fedsim.params import Params, flatten, moved, payload_bytes, unflatten
from fedsim.registry import name_of
from fedsim.training.models import Models
from fedsim.training.task import Task

Shapes = dict[str, tuple[int, ...]]  # by name


class Surveyor:
    """Sums what the clients of a chunk contribute, in float64."""

    def __init__(self, models: Models, clients: Population) -> None:
        self.models, self.clients = models, clients

    @torch.no_grad()
    def survey(self, task: Task, params: np.ndarray, shapes: Shapes, chunk: Sequence[int]) -> np.ndarray:
        """(Q,) float64, the sum of what the clients of these ids contribute.

        Args:
            params: (P,) all parameters of round 0.
            shapes: of what every client contributes.
        """
        module, like = self.models.module(task)
        module.eval().load_state_dict(moved(unflatten(params, like), self.models.device))
        total = np.zeros(sum(map(prod, shapes.values())))
        for client in map(self.clients.__getitem__, chunk):
            x = self.models.inputs(task, client.train).whole()
            y = torch.from_numpy(self.models.data.y[client.train]).to(x.device)
            context = self.models.contexts.of(task, 1, [client])
            group = self.models.groups(task, client.train)
            part = task.method.survey(module, Batch(x, y, client=context and context.part(0), group=group))
            if shapes_of(part) != shapes:
                raise TypeError(
                    f"{name_of(task.method)}: survey must return the same names and shapes for every client"
                )
            total += flatten({name: tensor.double() for name, tensor in part.items()})
        return total


class Survey:
    """The server's side of the survey.

    Attributes:
        shapes: of what every client contributes.
        payload: bytes that each client receives and sends for it.
    """

    def __init__(self, task: Task, params: Params, backbone: Backbone) -> None:
        """
        Args:
            params: all tensors of round 0.
        """
        self.task, self.module = task, task.build(backbone).to(getattr(torch, task.dtype))
        self.surveyed, self.constant = task.select(params, "surveyed"), task.select(params, "surveyed", "frozen")
        self.contribution = task.method.survey(self.module, _no_rows(task, backbone))
        if not self.contribution:
            raise TypeError(f"{self._name}: survey must return what a client contributes, and returns nothing")
        self.shapes = shapes_of(self.contribution)
        self.payload = payload_bytes(self.surveyed), payload_bytes(self.contribution)

    @torch.no_grad()
    def conclude(self, sums: Iterable[np.ndarray]) -> Params:
        """The tensors that the survey determines: all that have the scope `surveyed`, and perhaps frozen copies.

        Args:
            sums: those of the chunks, (Q,) float64 each.

        Raises:
            InputError: a sum, or one of these tensors, is not finite.
        """
        flat = np.zeros(sum(map(prod, self.shapes.values())))
        for part in sums:
            flat += part
        total = unflatten(flat, self.contribution)
        if names := _not_finite(total):
            raise InputError(
                f"method {self._name}: the survey sums up to values that are not finite, in {listing(names)}"
            )
        dtype = getattr(torch, self.task.dtype)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as everywhere else, or results could depend on the process that the driver is in
        try:
            tensors = self.task.method.surveyed(self.module, total)
        finally:
            torch.set_num_threads(threads)
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        fits = {name: name in self.constant and self.constant[name].shape == t.shape for name, t in tensors.items()}
        if not all(fits.values()) or self.surveyed.keys() - fits.keys():
            raise TypeError(f"{self._name}: surveyed must return {listing(self.surveyed)}, in their shapes")
        if names := _not_finite(tensors):
            raise InputError(f"method {self._name}: the survey gives {listing(names)} that are not finite")
        return tensors

    @property
    def _name(self) -> str:
        return name_of(self.task.method)


def shapes_of(tensors: Params) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _not_finite(tensors: Params) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _no_rows(task: Task, backbone: Backbone) -> Batch:
    """The batch of a client without rows; what it contributes has the names and shapes of any client's."""
    x, y = torch.zeros(0, backbone.width, dtype=getattr(torch, task.dtype)), torch.zeros(0, dtype=torch.int64)
    counts = torch.zeros(len(backbone.class_embeddings), dtype=torch.int64)
    context = ClientContext(torch.tensor(-1), counts, 1) if task.method.reads_client else None
    return Batch(x, y, client=context, group=y if task.method.reads_group else None)
