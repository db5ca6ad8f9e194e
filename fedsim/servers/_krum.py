"""The scores of Krum, by which `krum` and `bulyan` choose clients."""

import numpy as np

from fedsim.updates import RoundSum, blocks, stepped


def lowest_scores(total: RoundSum, f: int, m: int) -> np.ndarray:
    """The m clients with the lowest scores, as ascending positions among the `stepped` ones; ties go to the first.

    A score is the sum of squared distances to the n - f - 2 nearest neighbours.
    """
    distances = np.sort(_squared_distances(total), axis=1)  # the first is a client's distance to itself
    scores = distances[:, 1 : len(distances) - f - 1].sum(axis=1)
    return np.sort(np.argsort(scores, kind="stable")[:m])


def _squared_distances(total: RoundSum) -> np.ndarray:
    """(n, n) between the deltas of the clients that took a step."""
    distances = np.zeros((len(stepped(total)),) * 2)
    for _, deltas in blocks(total):
        # Pair by pair: with a matrix product, equal distances would differ by rounding and not be ties.
        for k, delta in enumerate(deltas[:-1]):
            gaps = deltas[k + 1 :] - delta
            distances[k, k + 1 :] += np.einsum("np,np->n", gaps, gaps)
    return distances + distances.T
