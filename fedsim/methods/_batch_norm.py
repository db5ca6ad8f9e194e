"""Batch normalization whose statistics can be averaged."""

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm


class BatchNorm(nn.Module):
    """`nn.BatchNorm1d` without its count of batches, an integer, which cannot be averaged and here decides nothing.

    In training it normalizes by the batch, and moves the running statistics in place; each client of a stack has its
    own. They are shared tensors, so clients are sent them, and the server combines what they have become. In
    evaluation it normalizes by them, so that no prediction depends on which rows are evaluated together.

    A batch of one row has no variance: a method that uses it needs `min_batch = 2`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # (B, width)
        # A user's server rule might make a variance negative.
        variance = self.running_var if self.training else self.running_var.clamp(min=0)
        return batch_norm(x, self.running_mean, variance, self.weight, self.bias, training=self.training)
