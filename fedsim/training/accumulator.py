"""The sum of a chunk's updates, client by client or stack by stack."""

import numpy as np
import torch

from fedsim.errors import InputError
from fedsim.params import Params, flatten, views
from fedsim.updates import ChunkSum


class Accumulator:
    """What becomes of a chunk's clients, as they come."""

    def __init__(self, shared: Params, device: str, each: bool) -> None:
        self.together = device != "cpu"  # one product for each tensor, where a kernel for each client would take longer
        size = sum(tensor.numel() for tensor in shared.values())
        self.shared, self.weight, self.message = shared, 0.0, np.zeros(0)
        self.delta = torch.zeros(0 if each else size, dtype=torch.float64, device=device)
        self.total = {} if each else views(self.delta, shared)
        # Adding float32 to float64 as it comes makes a new tensor for every client.
        room = torch.empty(max(map(torch.numel, shared.values()), default=0), dtype=torch.float64, device=device)
        self.doubled = {name: room[: tensor.numel()].view_as(tensor) for name, tensor in shared.items()}
        self.each: dict[int, np.ndarray] | None = {} if each else None

    def add(self, clients: list[int], ours: Params, messages: list[Params], weights: list[float]) -> None:
        """Adds a stack of M clients.

        Args:
            ours: (M, *shape) each, their shared tensors after training.
        """
        if self.together:
            scale = torch.tensor(weights, dtype=torch.float64, device=self.delta.device)
            for name, total in self.total.items():
                total.view(-1).add_(scale @ ours[name].reshape(len(weights), -1).double())
        for place, (client, message, weight) in enumerate(zip(clients, messages, weights, strict=True)):
            mine = {name: tensor[place] for name, tensor in ours.items()}
            self.weight += weight
            for name, total in self.total.items() if not self.together else ():
                total.add_(self.doubled[name].copy_(mine[name]), alpha=weight)
            if self.each is not None:
                self.each[client] = flatten({name: mine[name] - tensor for name, tensor in self.shared.items()})
            if message:
                said = weight * flatten(message).astype(np.float64)
                self.message = self.message + said if len(self.message) else said

    def sum(self, notes: np.ndarray) -> ChunkSum:
        for name, total in self.total.items():
            total.sub_(self.shared[name], alpha=self.weight)  # in float64 it does no harm to subtract last
        each = None
        if self.each is not None:
            each = np.stack([self.each[client] for client in notes["client"].tolist()])
            if not np.isfinite(each).all():
                raise InputError("training diverged: an update is not finite; try a smaller --method.lr")
        return ChunkSum(self.delta.cpu().numpy(), self.weight, notes, self.message, each)
