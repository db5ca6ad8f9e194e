"""How texts that share a start are packed into few sequences, each with the start once and without padding."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

TOGETHER = 64  # texts per start: attention, which is quadratic, would cost more than further texts save


class Packing(NamedTuple):
    """How the rests of n texts share R sequences: a start, then slots of one text each, with L tokens in all.

    Attributes:
        texts, tokens: (R, L) the text and its token at each place after the start.
        mask: (S + L, S + L) of 0 and -inf: the tokens that each token must not attend to, S of them in the start.
        rows, columns: (n,) the sequence and the place of each text's end.
    """

    texts: Tensor
    tokens: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor


@lru_cache(maxsize=16)
def packing_of(ends: tuple[int, ...], before: int, device: torch.device) -> Packing:
    """Texts of similar length, to the positions `ends` of their ends, have the same slot of different sequences.

    All sequences then have the same slots, one mask serves them, and hardly a token is padding.
    """
    count = len(ends)
    rows = max(1, -(-count // TOGETHER) if before else count)
    by_length = sorted(range(count), key=lambda text: -ends[text])
    # (slots, rows); the last slot may have more places than there are texts left, and repeats one.
    slots = torch.tensor(by_length + by_length[-1:] * (-count % rows), dtype=torch.long).view(-1, rows)
    at = torch.tensor(ends, dtype=torch.long)
    lengths = at[slots[:, 0]] + 1
    slot = torch.arange(len(slots)).repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    tokens = torch.arange(len(slot)) - first[slot]
    owner = torch.cat([torch.full((before,), -1), slot])
    order = torch.arange(len(owner))
    visible = (order[:, None] >= order) & ((owner[:, None] == owner) | (owner == -1))
    mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    place = torch.empty(count, dtype=torch.long)
    place[by_length] = torch.arange(count)
    columns = before + first[place // rows] + at
    packing = slots.T[:, slot], tokens.expand(rows, -1), mask, place % rows, columns
    return Packing(*(tensor.to(device) for tensor in packing))
