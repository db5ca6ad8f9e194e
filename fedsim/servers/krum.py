"""Byzantine-robust choice of the m clients nearest to their neighbours (Krum, multi-Krum).

Source: Blanchard et al. 2017, arXiv 1703.02757 (Krum and multi-Krum). Scores are those of the code of the authors'
group, LPD-EPFL/AggregaThor, commit e885f92, aggregators/krum.py, which always takes multi-Krum with m = n - f - 2.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field, Linear
from fedsim.servers import Server
from fedsim.servers._krum import lowest_scores
from fedsim.updates import apply_update, blocks, stepped


@component
class Krum(Server):
    """Averages the m clients with the lowest scores: sums of squared distances to their n - f - 2 nearest neighbours.

    A round with fewer than 2f + 3 responses changes nothing. The default f 1 is the smallest that protects.
    """

    needs_deltas = True

    f: int = Field(1, ge=0, description="Byzantine clients tolerated per round, which needs at least 2f + 3 clients")
    # The search goes up to what the smallest cohort allows: 5 clients with f 1.
    m: int = Field(1, ge=1, search=Linear(1, 4), description="clients that are averaged; 1 is Krum, more is multi-Krum")

    def check(self, params, cohort):
        if cohort < 2 * self.f + 3:
            raise InputError(f"krum with f {self.f} needs at least {2 * self.f + 3} clients per round, not {cohort}")
        if self.m > cohort - self.f:
            raise InputError(
                f"krum with f {self.f} can average at most {cohort - self.f} of {cohort} clients, "
                f"not {self.m}; set --server.m"
            )

    def step(self, params, slots, total, rng):
        clients = len(stepped(total))
        if clients < max(2 * self.f + 3, self.m + self.f):  # too few responses to tell which to trust
            return params, slots
        chosen = lowest_scores(total, self.f, self.m)
        mean = np.empty(total.require_deltas().shape[1])
        for block, deltas in blocks(total):
            mean[block] = deltas[chosen].mean(axis=0)
        return apply_update(params, unflatten(mean, params)), slots
