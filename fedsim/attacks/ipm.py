"""Malicious clients send the opposite of what the others send on average (inner-product manipulation, IPM).

Source: Xie, Koyejo and Gupta 2020, arXiv 1903.03936, "Fall of Empires"; as in epfml/byzantine-robust-noniid-optimizer,
commit 1cbe521, codes/attacks/xie.py. The attackers are omniscient: they know the updates of all others in the round.

Unread: the paper beyond its abstract.
"""

import numpy as np

from fedsim.attacks import Attack
from fedsim.registry import component
from fedsim.search_space import Field


@component
class Ipm(Attack):
    """-epsilon times the mean of the honest clients' updates; zeros in a round without any."""

    # Differs: no value is the paper's, which tests several.
    epsilon: float = Field(0.5, gt=0, description="length of what each of them sends, in that of the mean")

    def collude(self, deltas, malicious):
        honest = deltas[~malicious]
        mean = honest.mean(axis=0) if len(honest) else np.zeros(deltas.shape[1])
        return np.broadcast_to(-self.epsilon * mean, (int(malicious.sum()), deltas.shape[1]))
