"""Models whose weights are about to be loaded, without initializing them first."""

from typing import Any

from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

# Functions of `nn.init` that dispatch to the mode themselves would run with it disabled; the others call the tensor's.
# `Tensor.normal_` is left alone: `nn.init.trunc_normal_` repeats it until all values lie between its bounds.
_DRAWS = {Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_}


class Unset(TorchFunctionMode):
    """A context in which modules skip the random initialization of their weights, which stay as they were allocated.

    Only for models of which all weights are loaded. Initializing a large CLIP takes seconds in every process.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
