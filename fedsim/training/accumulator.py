"""The sum of a chunk's deltas, added stack by stack."""

from collections.abc import Sequence

import numpy as np
import torch

from fedsim.errors import Diverged
from fedsim.params import Params, flatten, views
from fedsim.servers import Reply
from fedsim.updates import ChunkSum


class Accumulator:
    """Adds up what the clients of a chunk return, in float64.

    On a CPU client by client, while a client's tensors are in cache; on a GPU a stack at a time, since a kernel per
    client would take longer.
    """

    def __init__(
        self, shared: Params, device: str, keep_sum: bool = True, keep_deltas: bool = False, deltas: bool = False
    ) -> None:
        """
        Args:
            shared: the shared tensors as the server has them.
            keep_sum, keep_deltas: keep the sum of the deltas, and the delta and message of each client.
            deltas: `add` gets deltas instead of trained tensors.
        """
        self.by_stack = device != "cpu"
        size = sum(tensor.numel() for tensor in shared.values())
        self.shared = {name: torch.zeros_like(tensor) for name, tensor in shared.items()} if deltas else shared
        self.weight, self.message = 0.0, np.zeros(0)
        self.delta = torch.zeros(size if keep_sum else 0, dtype=torch.float64, device=device)
        self.total = views(self.delta, shared) if keep_sum else {}
        # To add float32 to float64 directly would make a new tensor for every client.
        buffer = torch.empty(max(map(torch.numel, shared.values()), default=0), dtype=torch.float64, device=device)
        self.float64_buffers = {name: buffer[: tensor.numel()].view_as(tensor) for name, tensor in shared.items()}
        self.deltas: dict[int, np.ndarray] | None = {} if keep_deltas else None
        self.messages: dict[int, np.ndarray] = {}
        self.held: np.ndarray | None = None  # as in `ChunkSum`

    def add(self, clients: list[int], trained: Params, replies: list[Reply], held: Sequence[Params] = ()) -> None:
        """Adds a stack of M clients.

        Args:
            trained: (M, *shape) each, their shared tensors after training. Entries that a client does not have are set
                to the server's, so that their delta is zero.
            held: `Server.held` of each client; none: all clients have all.
        """
        for k, masks in enumerate(held):
            for name, mask in masks.items():
                trained[name][k] = torch.where(mask, trained[name][k], self.shared[name])
        if self.by_stack:
            weights = torch.tensor([reply.weight for reply in replies], dtype=torch.float64, device=self.delta.device)
            for name, total in self.total.items():
                total.view(-1).add_(weights @ trained[name].reshape(len(weights), -1).double())
        for k, (client, reply) in enumerate(zip(clients, replies, strict=True)):
            self._add_held(reply.weight, held[k] if held else {})
            self.weight += reply.weight
            for name, total in self.total.items() if not self.by_stack else ():
                total.add_(self.float64_buffers[name].copy_(trained[name][k]), alpha=reply.weight)
            message = flatten(reply.message).astype(np.float64)
            if self.deltas is not None:
                self.deltas[client] = flatten({name: trained[name][k] - old for name, old in self.shared.items()})
                self.messages[client] = message
            if len(message):
                self.message = self.message + reply.weight * message if len(self.message) else reply.weight * message

    def _add_held(self, weight: float, masks: Params) -> None:
        """Counts a client's weight for the entries that it has; before `weight` counts it."""
        if masks and self.held is None:  # the clients before it have all
            self.held = np.full(sum(map(torch.numel, self.shared.values())), self.weight)
        if self.held is not None:
            all_ = torch.ones((), dtype=torch.bool)
            whole = {name: masks.get(name, all_).expand(tensor.shape) for name, tensor in self.shared.items()}
            self.held += weight * flatten(whole)

    def sum(self, stats: np.ndarray, round: int) -> ChunkSum:
        """The chunk's sum.

        Args:
            stats: (n,) of `CLIENT_STATS`, by ascending client.
            round: for the message of an error.

        Raises:
            Diverged: a delta is not finite, where the deltas are kept; the sum is checked once for the whole round.
        """
        for name, total in self.total.items():
            total.sub_(self.shared[name], alpha=self.weight)  # in float64 nothing is lost by subtracting last
        deltas = messages = None
        if self.deltas is not None:
            ids = stats["client"].tolist()
            deltas, messages = (np.stack([kept[client] for client in ids]) for kept in (self.deltas, self.messages))
            if not np.isfinite(deltas).all():
                raise Diverged.in_round(round, "an update")
        return ChunkSum(self.delta.cpu().numpy(), self.weight, stats, self.message, deltas, messages, self.held)
