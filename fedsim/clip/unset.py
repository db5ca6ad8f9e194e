"""Models whose weights are about to be loaded, without drawing random ones first."""

from typing import Any

from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

# All that draws in `init`: some of its functions ask a mode themselves, and then call tensors where it sees nothing.
_DRAWS = {Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_}


class Unset(TorchFunctionMode):
    """Modules that are built within it draw no weights: these stay as they were allocated.

    Only for models of which all weights are loaded. Drawing those of a large CLIP takes seconds in every process.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
