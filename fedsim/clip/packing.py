"""How texts that share a start are packed into few sequences, each with the start once and without padding."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

TOGETHER = 64  # texts per start: attention, which is quadratic, would cost more than further texts save


class Packing(NamedTuple):
    """How the rests of n texts share R sequences: a start, then slots of one text each, with L tokens in all.

    Each of P clients may have n other texts. They have the same slots, as long as the longest text in them.

    Attributes:
        texts: (P, R, L) the text at each place after the start.
        tokens: (L,) its token there.
        mask: (S + L, S + L) of 0 and -inf: the tokens that each token must not attend to, S of them in the start.
        rows, columns: (P, n) the sequence and the place of each text's end.
    """

    texts: Tensor
    tokens: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor


@lru_cache(maxsize=16)
def packing_of(ends: tuple[tuple[int, ...], ...], before: int, device: torch.device) -> Packing:
    """Texts of similar length, to the positions `ends` of their ends, have the same slot of different sequences.

    All sequences then have the same slots, one mask serves them, and hardly a token is padding.

    Args:
        ends: of the n texts of each client.
        before: S, tokens of the start.
    """
    at = torch.tensor(ends, dtype=torch.long)
    clients, count = at.shape
    rows = max(1, -(-count // TOGETHER) if before else count)
    by_length = at.argsort(dim=1, descending=True, stable=True)
    # (P, slots, rows); the last slot may have more places than there are texts left, and repeats one.
    last = by_length[:, -1:].expand(-1, -count % rows)
    slots = torch.cat([by_length, last], dim=1).view(clients, -1, rows)
    lengths = at.gather(1, slots[:, :, 0]).amax(dim=0) + 1
    slot = torch.arange(len(lengths)).repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    tokens = torch.arange(len(slot)) - first[slot]
    owner = torch.cat([torch.full((before,), -1), slot])
    order = torch.arange(len(owner))
    visible = (order[:, None] >= order) & ((owner[:, None] == owner) | (owner == -1))
    mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    place = by_length.argsort(dim=1)
    columns = before + first[place // rows] + at
    packing = slots.mT[:, :, slot], tokens, mask, place % rows, columns
    return Packing(*(tensor.to(device) for tensor in packing))
