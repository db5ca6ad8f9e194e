"""Malicious clients send an update that is a little off the mean, where robust rules still trust it (ALIE).

Source: Baruch, Baruch and Goldberg 2019, arXiv 1902.06156, "A Little Is Enough"; z and the sign are those of
epfml/byzantine-robust-noniid-optimizer, commit 1cbe521, codes/attacks/alittle.py. As in the paper, but not in that
code, the attackers know only the updates that they themselves have trained, whose mean and deviation they take.

Differs: z is at least 0, where few attackers would have a negative one. Where they are the majority, they still count
on one supporter.

Unread: the paper beyond its abstract.
"""

from statistics import NormalDist

import numpy as np

from fedsim.attacks import Attack
from fedsim.registry import component
from fedsim.search_space import Field


@component
class Alie(Attack):
    """The mean of the malicious clients' updates minus z standard deviations, parameter by parameter.

    Of a single malicious client in a round, the deviation is 0, and it sends its own update.
    """

    z: float | None = Field(None, gt=0, description="deviations from the mean (default: the paper's, of each round)")

    def collude(self, deltas, malicious):
        own = deltas[malicious]
        z = z_max(len(deltas), len(own)) if self.z is None else self.z
        return np.broadcast_to(own.mean(axis=0) - z * own.std(axis=0), own.shape)


def z_max(clients: int, malicious: int) -> float:
    """The largest z at which the attackers are a majority together with the honest clients further from the mean.

    These supporters are s = floor(n / 2 + 1) - m of n - m honest clients, so z is the quantile (n - m - s) / (n - m) of
    the normal distribution.
    """
    honest = clients - malicious
    supporters = max(1, clients // 2 + 1 - malicious)
    if honest <= supporters:
        return 0.0
    return max(0.0, NormalDist().inv_cdf((honest - supporters) / honest))
