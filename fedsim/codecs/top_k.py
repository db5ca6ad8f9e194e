"""The largest numbers of an update, with their positions (top-k).

Source: Stich, Cordonnier and Jaggi 2018, arXiv 1809.07599, whose memory is error feedback here.
"""

import torch

from fedsim.codecs import Lossy, pack, unpack
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class TopK(Lossy):
    """k = `share` of the numbers, rounded, and at least one. A position takes ceil(log2 P) bits."""

    error_feedback: bool = True
    share: float = Field(0.01, gt=0, le=1, search=Log(1e-3, 0.3), description="of the numbers of an update, sent")

    def encode(self, update, rng):
        count = max(1, round(self.share * len(update)))
        # A stable sort, so that equal numbers are chosen in their order.
        positions = update.abs().sort(descending=True, stable=True).indices[:count].sort().values
        return {"positions": pack(positions, _bits(len(update))), "values": update[positions]}

    def decode(self, encoded, like):
        values = encoded["values"]
        return torch.zeros_like(like).index_copy_(
            0, unpack(encoded["positions"], _bits(len(like)), len(values)), values
        )


def _bits(count: int) -> int:
    return max(1, (count - 1).bit_length())
