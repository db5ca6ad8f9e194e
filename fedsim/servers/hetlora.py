"""LoRA pairs of unequal rank, padded with zeros and averaged by the norm of each client's product (HetLoRA).

Source: Cho et al. 2024, arXiv 2401.06432 (HetLoRA), of which no authors' code was found: not checked against code.

Unread: the paper beyond its abstract and the caption of its figure 2, which says how pairs are truncated, padded and
weighted. It does not say whether the norm is of each matrix or of all; here it is of all the products of a client, as
in programs by others. Nor does it say what becomes of directions that no client of a round has; here they stay.

Differs: ranks stay as the fleet says. In the paper a client lowers its rank when training under a regularizer has made
its last directions smaller (self-pruning). Products are multiplied by alpha / `--method.rank` whatever a client's rank.
"""

from dataclasses import replace
from typing import Literal

import numpy as np

from fedsim.params import flatten, unflatten
from fedsim.registry import component
from fedsim.search_space import Field
from fedsim.servers import Averaging
from fedsim.servers._lora import first_ranks, products, require_lora
from fedsim.updates import apply_update


@component
class HetLora(Averaging):
    """The server has pairs of `--method.rank`; a client of `--fleet.ranks` receives and sends the first of their ranks.

    What a client lacks counts as zero in the mean, so that later directions shrink. Clients with a larger product weigh
    more. With equal ranks and `weighting: uniform` it is FedIT (`fedavg`).
    """

    heeds = frozenset(("rank",))

    weighting: Literal["norm", "uniform", "rows"] = Field(
        "norm", description="weight of a client in the mean: the norm of its up @ down, 1, or its number of train rows"
    )

    def adapt(self, method):
        return require_lora(self, method)

    def held(self, params, device, rng):
        return first_ranks(params, device)

    def reply(self, update):
        reply = super().reply(update)
        if self.weighting != "norm":
            return reply
        return replace(reply, weight=sum(float(w.square().sum()) for w in products(update.trained).values()) ** 0.5)

    def step(self, params, slots, total, rng):
        if not total.weight:  # all products are still zero
            return params, slots
        delta = total.delta
        if total.held is not None:
            # Of the zero of a client that lacks an entry, the delta is minus the received value. What all lack stays:
            # a direction with zeros on both sides of its pair has no gradient and would never be trained again.
            lacking = np.where(total.held > 0, total.weight - total.held, 0.0)
            delta = delta - flatten(params).astype(np.float64) * lacking
        return apply_update(params, unflatten(delta / total.weight, params)), slots
