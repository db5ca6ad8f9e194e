"""Calls of the clients of a stack that `torch.vmap` cannot batch by itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor


def over_clients(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """One call of a function, under vmap for all clients of a stack, elsewhere for a single client.

    For the frozen text tower, where the texts of all clients are one batch; and for functions whose control flow or
    shapes depend on values. Autograd must be outside of vmap, where it sees the operations of the function as they are:
    torch has no batching rule for the backward pass of attention.

    Args:
        function: takes the tensors with a leading dimension of clients, M or 1 (all have the same), and returns
            (M, ...).
        tensors: without that dimension, as everywhere under vmap.
    """
    if any(map(is_batchedtensor, tensors)):
        return _OverClients.apply(function, *tensors)
    return function(*(tensor[None] for tensor in tensors))[0]


class _OverClients(torch.autograd.Function):
    """A batching rule. Nothing is left to be differentiated, so there is no backward pass."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Without it, torch refuses the rule."""

    @staticmethod
    def vmap(info: Any, dims: tuple, function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, int]:
        placed = zip(tensors, dims[1:], strict=True)
        return function(*(tensor[None] if dim is None else tensor.movedim(dim, 0) for tensor, dim in placed)), 0
