"""Text features that are used again while parameters stay the same."""

from collections import OrderedDict
from collections.abc import Callable
from math import inf

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from fedsim.files import digest

RESULTS = 16  # of several prompts, label spaces and data sets of a suite


class Memo:
    """The last results of one computation without gradients, by the values of the tensors from which they follow.

    An evaluation needs the same class texts for each batch, label space and chunk of clients, and encodes them once for
    all. A result is found by values alone, so other parameters never get it, no matter how tensors are changed.
    """

    def __init__(self, max_bytes: float = inf) -> None:
        """
        Args:
            max_bytes: of the tensors; a result that follows from more is computed each time.
        """
        self.max_bytes = max_bytes
        self.results: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, compute: Callable[[], Tensor], *tensors: Tensor) -> Tensor:
        """The result of `compute`; a training step, which has gradients or runs under vmap, always computes it.

        Args:
            compute: a function of the values of `tensors` and of constants.
        """
        if torch.is_grad_enabled() or any(map(is_batchedtensor, tensors)):
            return compute()
        if sum(tensor.nbytes for tensor in tensors) > self.max_bytes:
            return compute()
        key = digest(*(part for tensor in tensors for part in (f"{tensor.shape}", tensor.numpy(force=True))))
        self.results[key] = result = self.results.pop(key) if key in self.results else compute()
        if len(self.results) > RESULTS:
            self.results.popitem(last=False)
        return result.clone()  # callers may change it in place
