"""What a method inserts into the blocks of a frozen tower: tokens in front of the first blocks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Insertions(NamedTuple):
    """
    Attributes:
        tokens: (d, n, W) n tokens for each of the first d blocks. The first n are added to the input, after the patches
            of an image or after the first token of a text; in front of each further block, n others replace what has
            become of them.
    """

    tokens: Tensor


def through(transformer: Any, x: Tensor, place: int, insertions: Insertions, mask: Tensor | None = None) -> Tensor:
    """The blocks of an open_clip transformer, (B, T, W) -> (B, T, W).

    Args:
        x: the input, which has the first n tokens.
        place: the position of the first of the n tokens.
        mask: (T, T) that is added to the scores of attention.
    """
    for index, block in enumerate(transformer.resblocks):
        if 0 < index < len(insertions.tokens):
            x = replaced(x, place, insertions.tokens[index])
        x = block(x, attn_mask=mask)
    return x


def replaced(x: Tensor, place: int, tokens: Tensor) -> Tensor:
    """(B, T, W) with n tokens, (n, W), in place of those from `place` on; at the end, they are added."""
    tokens = tokens.to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, :place], tokens, x[:, place + tokens.shape[1] :]], dim=1)
