"""Unlabelled rows of the held-out domains, for methods that read them in training (`Method.reads_target`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.training.inputs import Inputs


class Targets:
    """What each client of a stack reads of the target rows: all of them in random order, again and again."""

    def __init__(self, x: Tensor | Inputs, rngs: Sequence[torch.Generator]) -> None:
        """
        Args:
            x: the inputs of all target rows.
            rngs: for each client, draws the order of each pass.
        """
        self.x, self.rngs = x, rngs
        self.left = [torch.empty(0, dtype=torch.int64) for _ in rngs]  # of each client's pass

    def take(self, size: int, first: int = 0, last: int | None = None) -> Tensor:
        """(last - first, size, ...) the next rows of the clients from `first` to before `last`."""
        return self.x[torch.stack([self._next(client, size) for client in range(len(self.rngs))[first:last]])]

    def _next(self, client: int, size: int) -> Tensor:
        order = self.left[client]
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(self.x), generator=self.rngs[client])])
        self.left[client] = order[size:]
        return order[:size]
