"""Krum's choice of clients, then a trimmed mean around the median of each parameter (Bulyan).

Source: El Mhamdi, Guerraoui and Rouault 2018, arXiv 1802.07927; with the scores of Krum. The code of the authors'
group is LPD-EPFL/AggregaThor, commit f55e696, native/op_bulyan/cpu.cpp.

Differs: the code chooses n - 2f - 2 times, each time without the clients chosen before, and each choice is a mean of
several clients. Here the n - 2f clients with the lowest scores are chosen at once. The median of an even number is the
mean of the two middle values; the code takes the upper one.

Unread: the paper. That n - 2f clients are chosen and n - 4f values averaged is from adap/flower, commit 00cd859,
src/py/flwr/server/strategy/aggregate.py, which chooses one by one too.
"""

import numpy as np

from fedsim.errors import InputError
from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field
from fedsim.servers import Server
from fedsim.servers._krum import lowest_scores
from fedsim.updates import apply_update, blocks, stepped


@component
class Bulyan(Server):
    """Averages, of the n - 2f clients that multi-Krum chooses, the n - 4f values nearest to their median.

    A round with fewer than 4f + 3 responses changes nothing. With f 0 this is uniform `fedavg`.
    """

    needs_deltas = True

    f: int = Field(1, ge=0, description="Byzantine clients tolerated per round, which needs at least 4f + 3 clients")

    def check(self, params, cohort):
        if cohort < 4 * self.f + 3:
            raise InputError(f"bulyan with f {self.f} needs at least {4 * self.f + 3} clients per round, not {cohort}")

    def step(self, params, slots, total, rng):
        clients = len(stepped(total))
        if clients < 4 * self.f + 3:  # too few responses to tell which to trust
            return params, slots
        chosen = lowest_scores(total, self.f, clients - 2 * self.f)
        mean = np.empty(total.require_deltas().shape[1])
        for block, deltas in blocks(total):
            values = np.sort(deltas[chosen], axis=0)
            nearest = np.argsort(abs(values - np.median(values, axis=0)), axis=0, kind="stable")  # ties: the smaller
            mean[block] = np.take_along_axis(values, nearest[: clients - 4 * self.f], axis=0).mean(axis=0)
        return apply_update(params, unflatten(mean, params)), slots
