"""Random numbers of an update, whose positions follow from a seed that is sent with them (random-k).

Source: Stich, Cordonnier and Jaggi 2018, arXiv 1809.07599, whose memory is error feedback here.
"""

import torch

from fedsim.codecs import Lossy
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class RandomK(Lossy):
    """k = `share` of the numbers, rounded, and at least one, drawn again by each client in each round.

    Without error feedback they are scaled by P / k, so that the expectation is the update itself.
    """

    share: float = Field(0.01, gt=0, le=1, search=Log(1e-3, 0.3), description="of the numbers of an update, sent")

    def encode(self, update, rng):
        count = max(1, round(self.share * len(update)))
        seed = torch.randint(1 << 62, (), generator=rng)
        values = update[_positions(seed, update, count)]
        return {"seed": seed, "values": values if self.error_feedback else values * (len(update) / count)}

    def decode(self, encoded, like):
        values = encoded["values"]
        return torch.zeros_like(like).index_copy_(0, _positions(encoded["seed"], like, len(values)), values)


def _positions(seed: torch.Tensor, like: torch.Tensor, count: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(int(seed))
    return torch.randperm(len(like), generator=rng)[:count].to(like.device)
