"""Bottleneck adapters after the blocks of a frozen tower."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fedsim.clip.insertions import Insertions


class Bottleneck(nn.Module):
    def __init__(self, width: int, narrow: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, narrow), nn.Linear(narrow, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:  # (..., W) -> (..., W)
        return self.up(self.activation(self.down(x)))


def added(adapters: Iterable[nn.Module]) -> Insertions:
    """To the output of each block is added what its adapter makes of it."""
    return Insertions(after={k: lambda _, x, y, a=adapter: y + a(y) for k, adapter in enumerate(adapters)})
