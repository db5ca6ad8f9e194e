"""What a method that reads its client gets (`ClientContext`)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.clients import Client
from fedsim.methods import ClientContext
from fedsim.representations import Encoded
from fedsim.training.task import Task


class ClientContexts:
    """The contexts of clients, in training and in evaluation."""

    def __init__(self, data: Encoded, device: str) -> None:
        self.data, self.device = data, device

    def of(self, task: Task, round: int, clients: Sequence[Client]) -> ClientContext | None:
        """That of a stack of clients; None if the method does not read it."""
        if not task.method.reads_client:
            return None
        domains = torch.tensor([self._domain(client) for client in clients], device=self.device)
        counts = torch.stack([self._counts(client) for client in clients]).to(self.device)
        ids = torch.tensor([client.id for client in clients], device=self.device)
        return ClientContext(domains, counts, round, task.rounds if task.method.fixed_rounds else None, ids)

    def _counts(self, client: Client) -> Tensor:
        return torch.from_numpy(np.bincount(self.data.y[client.train], minlength=len(self.data.classes)))

    def _domain(self, client: Client) -> int:
        domains = np.unique(self.data.domain[client.train if len(client.train) else client.test])
        return int(domains[0]) if len(domains) == 1 else -1
