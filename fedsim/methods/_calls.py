"""Calls of a module with other tensors in place of its own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from fedsim.params import Params


def with_tensors(function: Callable[..., Tensor], module: nn.Module, tensors: Params, *args: Any) -> Tensor:
    """function(module, *args), such as a method's `loss`, while the module has these tensors.

    Args:
        tensors: by name in the module; it keeps its others.
    """
    # `functional_call` replaces tensors during one forward pass only.
    return functional_call(_Call(function, module), {f"module.{name}": t for name, t in tensors.items()}, args)


class _Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *args: Any) -> Tensor:
        return self.function(self.module, *args)
