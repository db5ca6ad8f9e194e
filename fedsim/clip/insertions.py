"""What a method inserts into the blocks of a frozen tower, or leaves out: tokens, functions after blocks, blocks."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# (block, x, y) -> (B, T, W), what the next block reads, where the open_clip block has read x and returned y. A sequence
# of the text tower holds several texts, so a function treats each token by itself.
After = Callable[[Any, Tensor, Tensor], Tensor]


class Insertions(NamedTuple):
    """What is inserted into the blocks of a tower.

    Attributes:
        tokens: (d, n, W) n tokens for each of the first d blocks; in the image tower also (d, B, n, W), those of each
            image. The first n are added to the input, after the patches of an image or after the first token of a text;
            in front of each further block, n others replace what has become of them.
        after: the function after a block, by the index of the block.
        left_out: the indices of blocks that are left out, with the functions after them.
    """

    tokens: Tensor | None = None
    after: Mapping[int, After] = MappingProxyType({})
    left_out: frozenset[int] = frozenset()


def through(transformer: Any, x: Tensor, position: int, insertions: Insertions, mask: Tensor | None = None) -> Tensor:
    """The blocks of an open_clip transformer, (B, T, W) -> (B, T, W).

    Args:
        x: the input, which has the first n tokens.
        position: that of the first of the n tokens.
        mask: (T, T) that is added to the scores of attention.
    """
    tokens, after, left_out = insertions
    for index, block in enumerate(transformer.resblocks):
        if tokens is not None and 0 < index < len(tokens):
            x = replaced(x, position, tokens[index])
        if index in left_out:
            continue
        y = block(x, attn_mask=mask)
        x = after[index](block, x, y) if index in after else y
    return x


def replaced(x: Tensor, position: int, tokens: Tensor) -> Tensor:
    """(B, T, W) with n tokens, (n, W) or (B, n, W), in place of those from `position` on, or added at the end."""
    tokens = tokens.to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, :position], tokens, x[:, position + tokens.shape[1] :]], dim=1)
