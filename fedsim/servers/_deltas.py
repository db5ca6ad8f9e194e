"""Distances and weighted sums of the clients' deltas, block by block: all of them together may not fit in memory."""

import numpy as np

from fedsim.params import Params, unflatten
from fedsim.updates import RoundSum, blocks, stepped


def distances(total: RoundSum, point: np.ndarray) -> np.ndarray:
    """(n,) from the deltas of the `stepped` clients to a point (P,)."""
    squares = np.zeros(len(stepped(total)))
    for block, deltas in blocks(total):
        gaps = deltas - point[block]
        squares += np.einsum("np,np->n", gaps, gaps)
    return np.sqrt(squares)


def weighted_mean(total: RoundSum, weights: np.ndarray, like: Params) -> Params:
    """The mean delta of the clients of a round with weights (n,), for rules with `needs_deltas`, which get no sum.

    Clients without a step have a delta of 0.
    """
    return unflatten(weighted_sum(total, weights[stepped(total)]) / weights.sum(), like)


def weighted_sum(total: RoundSum, weights: np.ndarray) -> np.ndarray:
    """(P,) of the deltas of the `stepped` clients, with weights (n,)."""
    result = np.empty(total.require_deltas().shape[1])
    for block, deltas in blocks(total):
        # Not `weights @ deltas`, whose last bits depend on the threads of BLAS.
        result[block] = np.einsum("n,np->p", weights, deltas)
    return result
