"""Clients weigh as much as their deltas point where the server's own points, and all have its length (FLTrust).

Source: Cao, Fang, Liu and Gong 2021, arXiv 2012.13995: a client's trust is the cosine of its delta and the server's, or
0 if that is negative; its delta gets the length of the server's; the step is the mean by trust. The server trains on a
small clean set, the root set, as a client does, by default of 100 rows. Their global step size is left out: it is 1.

Differs: the root set is a copy of train rows that clients have, drawn by the seed; no client loses any. If no client is
trusted, the round changes nothing. The server's training is not counted in steps, operations or simulated time.

Unread: the paper. Its formulas are those of a reimplementation, zhmzm/FLTrust_pytorch, commit 05820a2,
src/FLTrustServer.py, whose root set has 100 rows, too.
"""

import numpy as np

from fedsim.params import unflatten
from fedsim.registry import component
from fedsim.search_space import Field
from fedsim.servers import Server
from fedsim.servers._deltas import distances, weighted_sum
from fedsim.updates import apply_update, blocks, stepped


@component
class FLTrust(Server):
    """The mean of the deltas by trust. No delta can make the step longer than the server's."""

    needs_deltas = True

    root_rows: int = Field(100, ge=1, description="train rows of clients of which the server has a clean copy")

    def step(self, params, slots, total, rng):
        root = total.require_root()
        length = np.sqrt(np.einsum("p,p->", root, root))
        products = np.zeros(len(stepped(total)))
        for block, deltas in blocks(total):
            products += np.einsum("np,p->n", deltas, root[block])
        lengths = distances(total, np.zeros(len(root)))
        cosines = np.divide(products, lengths * length, out=np.zeros(len(products)), where=lengths * length > 0)
        trust = np.maximum(cosines, 0.0)
        if not trust.any():
            return params, slots
        scale = np.divide(length, lengths, out=np.zeros(len(lengths)), where=lengths > 0)
        step = weighted_sum(total, trust / trust.sum() * scale)
        return apply_update(params, unflatten(step, params)), slots
