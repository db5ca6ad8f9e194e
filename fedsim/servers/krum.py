"""The delta that lies nearest to its neighbours, in place of the mean; or the mean of the m that lie nearest.

Source: Blanchard et al. 2017, arXiv 1703.02757 (Krum and multi-Krum). Scores are those of the code of the authors'
group, LPD-EPFL/AggregaThor, commit e885f92, aggregators/krum.py, which always takes multi-Krum with m = n - f - 2.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field, Linear
from fedsim.servers import Server
from fedsim.updates import RoundSum, apply_update, blocks, stepped


@component
class Krum(Server):
    """A client's score is the sum of its squared distances to the n - f - 2 nearest others; the least win.

    A round in which fewer than 2f + 3 answer changes nothing. f is the user's to say; 1 is the least that protects.
    """

    sees_each = True

    f: int = Field(1, ge=0, description="clients of a cohort that may send anything; it wants 2f + 3 clients or more")
    # As many as the least cohort that krum takes, of 5 with f 1, can give.
    m: int = Field(
        1, ge=1, search=Linear(1, 4), description="clients whose mean is taken; 1 is Krum, more is multi-Krum"
    )

    def check(self, params, cohort):
        if cohort < 2 * self.f + 3:
            raise InputError(f"krum with f {self.f} wants {2 * self.f + 3} clients or more in a round, not {cohort}")
        if self.m > cohort - self.f:
            raise InputError(
                f"krum with f {self.f} takes the mean of {cohort - self.f} of {cohort} clients at most, "
                f"not of {self.m}; set --server.m"
            )

    def step(self, params, slots, total, rng):
        clients = len(stepped(total))
        if clients < max(2 * self.f + 3, self.m + self.f):  # too few have answered for any to be trusted
            return params, slots
        apart = np.sort(_squared_distances(total), axis=1)  # a client's distance to itself comes first
        scores = apart[:, 1 : clients - self.f - 1].sum(axis=1)
        chosen = np.sort(np.argsort(scores, kind="stable")[: self.m])  # of equal scores, who comes first
        mean = np.empty(total.each.shape[1])
        for place, each in blocks(total):
            mean[place] = each[chosen].mean(axis=0)
        return apply_update(params, unflatten(mean, params)), slots


def _squared_distances(total: RoundSum) -> np.ndarray:
    """(n, n) between the deltas of those that took a step."""
    apart = np.zeros((len(stepped(total)),) * 2)
    for _, each in blocks(total):
        # Pair by pair: by a product of matrices, equals would lie a rounding apart, and not be tied.
        for k, one in enumerate(each[:-1]):
            gaps = each[k + 1 :] - one
            apart[k, k + 1 :] += np.einsum("np,np->n", gaps, gaps)
    return apart + apart.T
